//! Completions for shells, and man pages, from the definitions of the options themselves.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::CommandFactory;
use clap_complete::Shell;

use crate::Arguments;
use crate::output::{complain, emit};

#[derive(Debug, clap::Args)]
#[command(after_help = "\
bash: smc completions bash > ~/.local/share/bash-completion/completions/smc
zsh:  smc completions zsh > a folder of $fpath, as _smc
fish: smc completions fish > ~/.config/fish/completions/smc.fish")]
pub struct CompletionOptions {
    #[arg(value_enum)]
    shell: Shell,
}

/// Writes the script to standard output.
pub fn completions(options: &CompletionOptions) -> ExitCode {
    let mut script = Vec::new();
    clap_complete::generate(options.shell, &mut Arguments::command(), "smc", &mut script);
    emit(&String::from_utf8_lossy(&script), ExitCode::SUCCESS)
}

#[derive(Debug, clap::Args)]
pub struct ManOptions {
    /// Write all pages into this folder, as smc.1, smc-run.1 and so on
    #[arg(long, value_name = "FOLDER")]
    into: Option<PathBuf>,
    /// A subcommand, in words: `smc man perf client`
    #[arg(conflicts_with = "into")]
    command: Vec<String>,
}

/// One page to standard output (`smc man run | man -l -`), or all into a folder.
pub fn man(options: &ManOptions) -> ExitCode {
    let result = match &options.into {
        Some(folder) => fs::create_dir_all(folder)
            .and_then(|()| clap_mangen::generate_to(Arguments::command(), folder))
            .map(|()| String::new()),
        None => page(&options.command),
    };
    match result {
        Ok(text) => emit(&text, ExitCode::SUCCESS),
        Err(e) => {
            complain(&e);
            ExitCode::FAILURE
        }
    }
}

fn page(words: &[String]) -> io::Result<String> {
    let mut command = Arguments::command();
    command.build();
    for word in words {
        let found = command.find_subcommand(word).filter(|c| !c.is_hide_set()).cloned();
        command =
            found.ok_or_else(|| io::Error::other(format!("smc has no subcommand {}", words.join(" "))))?;
    }
    let mut text = Vec::new();
    clap_mangen::Man::new(command).render(&mut text)?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_subcommand_has_a_page_with_its_options() {
        let words = |text: &str| text.split(' ').map(String::from).collect::<Vec<_>>();
        for (name, option) in [("run", "upgrade\\-after"), ("perf client", "zerocopy"), ("ss", "wide")] {
            let text = page(&words(name)).expect("a page");
            assert!(text.contains(".TH") && text.contains(option), "{name}: {text}");
        }
        assert!(page(&words("fly")).is_err());
        assert!(page(&words("__probe")).is_err());
        assert!(page(&[]).is_ok_and(|t| t.contains("perf") && !t.contains("__probe")));
    }

    #[test]
    fn definitions_are_sound() {
        Arguments::command().debug_assert();
    }
}
