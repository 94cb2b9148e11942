//! `postbox completions`.

use clap::{Args, CommandFactory};
use clap_complete::Shell;

/// Prints a script that completes postbox' commands and flags in a shell.
///
/// For example: postbox completions bash > ~/.local/share/bash-completion/completions/postbox
#[derive(Debug, Args)]
pub(super) struct CompletionsCommand {
    /// The shell.
    shell: Shell,
}

impl CompletionsCommand {
    pub(super) fn run(&self) -> anyhow::Result<()> {
        let mut command = super::Arguments::command();
        clap_complete::generate(self.shell, &mut command, "postbox", &mut std::io::stdout());
        Ok(())
    }
}
