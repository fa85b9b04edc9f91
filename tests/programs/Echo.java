// Echo servers, blocking and by NIO selector, and a client that checks every byte.
// A server ends after the number of connections it was told, so that everything at exit is done.

import java.io.*;
import java.net.*;
import java.nio.ByteBuffer;
import java.nio.channels.*;
import java.util.*;

public class Echo {
    static void blocking(int port, int n) throws Exception {
        List<Thread> threads = new ArrayList<>();
        try (ServerSocket s = new ServerSocket(port, 200, InetAddress.getLoopbackAddress())) {
            for (int i = 0; i < n; i++) {
                Socket c = s.accept();
                Thread t = new Thread(() -> {
                    try (c) {
                        c.getInputStream().transferTo(c.getOutputStream());
                        c.shutdownOutput();
                    } catch (IOException e) {
                        e.printStackTrace();
                        System.exit(3);
                    }
                });
                t.start();
                threads.add(t);
            }
        }
        for (Thread t : threads) t.join();
    }

    static void nio(int port, int n) throws Exception {
        Selector sel = Selector.open();
        ServerSocketChannel ss = ServerSocketChannel.open();
        ss.bind(new InetSocketAddress(InetAddress.getLoopbackAddress(), port), 200);
        ss.configureBlocking(false);
        ss.register(sel, SelectionKey.OP_ACCEPT);
        int closed = 0;
        while (closed < n) {
            sel.select();
            Iterator<SelectionKey> it = sel.selectedKeys().iterator();
            while (it.hasNext()) {
                SelectionKey k = it.next();
                it.remove();
                if (k.isAcceptable()) {
                    SocketChannel c = ss.accept();
                    if (c == null) continue;
                    c.configureBlocking(false);
                    c.register(sel, SelectionKey.OP_READ, ByteBuffer.allocateDirect(65536));
                    continue;
                }
                SocketChannel c = (SocketChannel) k.channel();
                ByteBuffer b = (ByteBuffer) k.attachment();
                boolean end = k.isReadable() && b.hasRemaining() && c.read(b) < 0;
                b.flip();
                c.write(b);
                if (end) {
                    c.configureBlocking(false);
                    while (b.hasRemaining()) c.write(b);
                    c.close();
                    closed++;
                    continue;
                }
                int left = b.remaining();
                b.compact();
                int ops = left == 0 ? 0 : SelectionKey.OP_WRITE;
                if (b.hasRemaining()) ops |= SelectionKey.OP_READ;
                k.interestOps(ops);
            }
        }
    }

    static void client(int port, int n, int size) throws Exception {
        for (int round = 0; round < n; round++) {
            byte[] d = new byte[size];
            new Random(round).nextBytes(d);
            try (Socket s = new Socket(InetAddress.getLoopbackAddress(), port)) {
                s.setTcpNoDelay(true);
                InputStream in = s.getInputStream();
                OutputStream out = s.getOutputStream();
                // Small exchanges first, then everything at once in both directions.
                for (int i = 0; i < 200; i++) {
                    out.write(d, i, 1);
                    if (in.read() != (d[i] & 255)) throw new IOException("byte " + i);
                }
                Thread t = new Thread(() -> {
                    try {
                        out.write(d);
                        s.shutdownOutput();
                    } catch (IOException e) {
                        e.printStackTrace();
                        System.exit(3);
                    }
                });
                t.start();
                byte[] r = in.readAllBytes();
                t.join();
                if (!Arrays.equals(d, r)) throw new IOException("round " + round + ": " + r.length + " of " + size);
            }
        }
        System.out.println("all right");
    }

    public static void main(String[] a) throws Exception {
        int port = Integer.parseInt(a[1]), n = Integer.parseInt(a[2]);
        switch (a[0]) {
            case "blocking" -> blocking(port, n);
            case "nio" -> nio(port, n);
            default -> client(port, n, Integer.parseInt(a[3]));
        }
    }
}
