//! Has the disk work while the stream is unpacked, instead of after it: a thread syncs the file systems each time enough
//! was written. Success is still told by one sync at the very end, and an error that any of them tells is an error.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{Scope, ScopedJoinHandle};

use rustix::fs::syncfs;

use crate::target::Directory;
use crate::unpack::UnpackError;

/// Bytes of content after which the disk is to start.
const EVERY: u64 = 64 << 20;

type FileSystems = Vec<Arc<Directory>>;

pub(crate) struct Flusher<'scope> {
    sender: SyncSender<FileSystems>,
    thread: ScopedJoinHandle<'scope, Result<(), UnpackError>>,
    written: u64,
}

/// Has the file systems of these directories put everything on the disk.
pub(crate) fn sync<'a>(
    file_systems: impl IntoIterator<Item = &'a Arc<Directory>>,
) -> Result<(), UnpackError> {
    for directory in file_systems {
        syncfs(directory).map_err(|e| UnpackError::file("syncing the file systems below", b"", e))?;
    }
    Ok(())
}

fn work(requests: &Receiver<FileSystems>) -> Result<(), UnpackError> {
    // The kernel tells an error of writing once only: none may be lost on the way to the end.
    requests.iter().try_for_each(|file_systems| sync(&file_systems))
}

impl<'scope> Flusher<'scope> {
    pub(crate) fn start<'env>(scope: &'scope Scope<'scope, 'env>) -> Self {
        let (sender, receiver) = sync_channel(1);
        Self { sender, thread: scope.spawn(move || work(&receiver)), written: 0 }
    }

    /// Says that so many more bytes were written to some of the `file_systems`.
    pub(crate) fn written<'a>(&mut self, bytes: u64, file_systems: impl Iterator<Item = &'a Arc<Directory>>) {
        self.written += bytes;
        if self.written >= EVERY {
            self.written = 0;
            // Where it has not come after the last request, or has failed, there is nothing to be asked for.
            let _ = self.sender.try_send(file_systems.cloned().collect());
        }
    }

    /// Waits for what is under way.
    ///
    /// # Errors
    /// The first that any sync met.
    pub(crate) fn finish(self) -> Result<(), UnpackError> {
        drop(self.sender);
        // A panic there goes on here.
        self.thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::io::Errno;

    #[test]
    fn an_error_of_an_early_sync_is_not_lost() {
        let failed = std::thread::scope(|scope| {
            let (sender, receiver) = sync_channel::<FileSystems>(1);
            let thread = scope.spawn(move || {
                receiver.iter().try_for_each(|_| Err(UnpackError::file("syncing", b"x", Errno::IO)))
            });
            let mut flusher = Flusher { sender, thread, written: 0 };
            flusher.written(EVERY, std::iter::empty());
            flusher.finish()
        });
        assert!(failed.unwrap_err().to_string().contains("syncing /x"));
    }
}
