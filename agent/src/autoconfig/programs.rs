//! The clone's own programs: those that change something are run inside it, but a dry run only notes them, and tests
//! stand in for programs that no test machine has.

use super::Context;
use anyhow::Result;
use ka_sys::process::{Output, command_in, run, run_in, run_with_input};
use std::cell::RefCell;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// How the clone's programs are run.
pub enum Programs {
    /// Inside the clone (chroot).
    Inside,
    /// Those that change something are not run; their command lines are noted.
    Noted(RefCell<Vec<String>>),
    /// A function answers in their place; the command lines are noted.
    #[cfg(test)]
    Pretended {
        /// What a program with these words does and writes.
        answer: Answer,
        /// What was run.
        ran: RefCell<Vec<String>>,
    },
}

/// What a pretended program writes; it gets its command line.
#[cfg(test)]
pub type Answer = Box<dyn Fn(&str) -> Result<String>>;

fn line(program: &str, args: &[&str]) -> String {
    let mut words = vec![program];
    words.extend(args);
    words.join(" ")
}

impl Context<'_> {
    /// Runs a program that changes something. In a dry run it is noted, and nothing comes back from it.
    pub(super) fn run(&self, program: &str, args: &[&str], limit: Duration) -> Result<Output> {
        self.run_with_input(program, args, &[], limit)
    }

    /// [`Context::run`] with `input` on standard input.
    pub(super) fn run_with_input(
        &self,
        program: &str,
        args: &[&str],
        input: &[u8],
        limit: Duration,
    ) -> Result<Output> {
        match &self.programs {
            Programs::Inside => {
                let mut command = command_in(self.target, program);
                Ok(run_with_input(command.args(args), input, limit)?)
            }
            Programs::Noted(notes) => {
                notes.borrow_mut().push(line(program, args));
                Ok(Output { stdout: Vec::new(), stderr: Vec::new() })
            }
            #[cfg(test)]
            Programs::Pretended { .. } => self.pretend(&line(program, args)),
        }
    }

    /// Runs a program that only tells something; a dry run does so too.
    pub(super) fn ask(&self, program: &str, args: &[&str], limit: Duration) -> Result<Output> {
        match &self.programs {
            Programs::Noted(_) if self.target == Path::new("/") => {
                Ok(run(Command::new(program).args(args).env("LC_ALL", "C"), limit)?)
            }
            Programs::Inside | Programs::Noted(_) => Ok(run_in(self.target, program, args, limit)?),
            #[cfg(test)]
            Programs::Pretended { .. } => self.pretend(&line(program, args)),
        }
    }

    /// Whether nothing may really be changed.
    pub(super) const fn is_dry(&self) -> bool {
        matches!(self.programs, Programs::Noted(_))
    }

    /// The first of these files that the clone has, as its programs lie in different places.
    pub(super) fn first_of<'p>(&self, paths: &[&'p str]) -> Option<&'p str> {
        paths.iter().copied().find(|path| self.root.exists(path))
    }

    /// What was noted since the last time.
    pub(super) fn take_notes(&self) -> Vec<String> {
        match &self.programs {
            Programs::Noted(notes) => notes.take(),
            _ => Vec::new(),
        }
    }

    #[cfg(test)]
    fn pretend(&self, line: &str) -> Result<Output> {
        let Programs::Pretended { answer, ran } = &self.programs else {
            unreachable!("asked for by pretenders")
        };
        ran.borrow_mut().push(line.to_owned());
        Ok(Output { stdout: answer(line)?.into_bytes(), stderr: Vec::new() })
    }

    /// The command lines of all programs that tests stood in for.
    #[cfg(test)]
    pub(super) fn ran(&self) -> Vec<String> {
        match &self.programs {
            Programs::Pretended { ran, .. } => ran.borrow().clone(),
            _ => Vec::new(),
        }
    }
}
