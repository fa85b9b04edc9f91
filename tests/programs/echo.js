// An HTTP server that sends back what it is sent, and a client that checks every byte.
// `node echo.js server PORT`, `node echo.js client PORT`; the client ends the server when it is done.
'use strict';
const http = require('http');
const crypto = require('crypto');

const [, , role, port] = process.argv;

if (role === 'server') {
  const server = http.createServer((q, r) => {
    if (q.url === '/end') {
      r.end('bye');
      server.close();
      server.closeIdleConnections?.();
      return;
    }
    q.pipe(r);
  });
  server.listen(+port, '127.0.0.1');
} else {
  const agent = new http.Agent({ keepAlive: true, maxSockets: 5 });
  const call = (path, body) => new Promise((done, fail) => {
    const q = http.request({ host: '127.0.0.1', port: +port, method: 'POST', path, agent }, r => {
      const got = [];
      r.on('data', d => got.push(d)).on('end', () => done(Buffer.concat(got)));
    });
    q.on('error', fail);
    q.end(body);
  });
  (async () => {
    const sizes = Array.from({ length: 300 }, (_, i) => i * 211).concat([5e6, 9e6]);
    await Promise.all(sizes.map(async n => {
      const body = crypto.randomBytes(n);
      if (!(await call('/echo', body)).equals(body)) throw new Error('wrong bytes of ' + n);
    }));
    await call('/end', '');
    agent.destroy();
    console.log('all right');
  })().catch(e => {
    console.error(e);
    process.exit(1);
  });
}
