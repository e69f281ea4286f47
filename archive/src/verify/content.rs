//! Reads and digests file contents on several threads beside the walk. Of the files handed over and not yet answered for
//! there are never more than a fixed number, so that neither memory nor descriptors grow with the tree.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{Advice, fadvise};
use rustix::io::{Errno, pread};

use crate::digest::Digester;
use crate::manifest::Content;
use crate::sparse;

const BUFFER: usize = 256 << 10;
/// Files under way for each thread.
const UNDER_WAY: usize = 16;
/// Most files under way: each is open, and many systems let a program have no more than 1024 of those.
const MOST: usize = 256;
/// Most threads: more never read faster.
const MOST_THREADS: usize = 64;

/// A file whose content is to be compared.
struct Job {
    path: Vec<u8>,
    file: OwnedFd,
    content: Content,
}

/// What came out.
pub(super) struct Answer {
    pub path: Vec<u8>,
    /// Bytes read.
    pub bytes: u64,
    /// Whether the content is as it should be; or the step that failed, and why.
    pub same: Result<bool, (&'static str, Errno)>,
}

/// The threads.
pub(super) struct Pool {
    jobs: Option<Sender<Job>>,
    answers: Receiver<Answer>,
    threads: Vec<JoinHandle<()>>,
    under_way: usize,
}

impl Pool {
    /// Starts `threads` threads, at least one and not too many.
    pub(super) fn new(threads: usize) -> Self {
        let (jobs, queue) = channel();
        let (sender, answers) = channel();
        let queue = Arc::new(Mutex::new(queue));
        let threads = (0..threads.clamp(1, MOST_THREADS))
            .map(|_| {
                let (queue, sender) = (Arc::clone(&queue), sender.clone());
                std::thread::spawn(move || work(&queue, &sender))
            })
            .collect();
        Self { jobs: Some(jobs), answers, threads, under_way: 0 }
    }

    /// Hands a file over; `take` gets the answers for which room must be made first.
    pub(super) fn submit(&mut self, path: &[u8], file: OwnedFd, content: Content, take: impl FnMut(Answer)) {
        self.wait((self.threads.len() * UNDER_WAY).min(MOST) - 1, take);
        let job = Job { path: path.to_vec(), file, content };
        if self.jobs.as_ref().is_some_and(|jobs| jobs.send(job).is_ok()) {
            self.under_way += 1;
        }
    }

    /// Takes answers until at most `left` files are under way.
    pub(super) fn wait(&mut self, left: usize, mut take: impl FnMut(Answer)) {
        while self.under_way > left {
            let Ok(answer) = self.answers.recv() else { return };
            self.under_way -= 1;
            take(answer);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.jobs = None;
        for thread in self.threads.drain(..) {
            // A thread that panicked has said so itself.
            let _ = thread.join();
        }
    }
}

fn work(queue: &Mutex<Receiver<Job>>, answers: &Sender<Answer>) {
    let mut buffer = vec![0; BUFFER];
    loop {
        let job = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(job) = job else { return };
        let mut bytes = 0;
        let same = compare(&job, &mut buffer, &mut bytes);
        if answers.send(Answer { path: job.path, bytes, same }).is_err() {
            return;
        }
    }
}

fn compare(job: &Job, buffer: &mut [u8], bytes: &mut u64) -> Result<bool, (&'static str, Errno)> {
    let Content { size, sparse, digest } = job.content;
    let map = if sparse {
        sparse::data_regions(job.file.as_fd(), size).map_err(|e| ("finding the holes of it", e))?
    } else {
        vec![(0, size)]
    };
    if size >= 1 << 20 {
        // A hint only.
        let _ = fadvise(&job.file, 0, None, Advice::Sequential);
    }
    let mut digester = Digester::new(sparse);
    for (offset, length) in map {
        let end = offset + length;
        let mut position = offset;
        while position < end {
            let room = buffer.len().min(usize::try_from(end - position).unwrap_or(usize::MAX));
            match pread(&job.file, &mut buffer[..room], position) {
                // It has become shorter while it was read.
                Ok(0) => return Ok(false),
                Ok(count) => {
                    digester.data(position, &buffer[..count]);
                    position += count as u64;
                    *bytes += count as u64;
                }
                Err(Errno::INTR) => {}
                Err(e) => return Err(("reading it", e)),
            }
        }
    }
    Ok(digester.finish(size) == digest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_processors_need_no_more_descriptors_than_programs_may_have() {
        let content = Content { size: 0, sparse: false, digest: Digester::new(false).finish(0) };
        let file = tempfile::tempfile().unwrap();
        let mut pool = Pool::new(1000);
        let (mut most, mut same) = (0, 0);
        for _ in 0..2000 {
            let file = file.try_clone().unwrap().into();
            pool.submit(b"x", file, content, |answer| same += usize::from(answer.same == Ok(true)));
            most = most.max(pool.under_way);
        }
        pool.wait(0, |answer| same += usize::from(answer.same == Ok(true)));
        assert!(most <= 256 && pool.threads.len() <= 64, "{most} files, {} threads", pool.threads.len());
        assert_eq!(same, 2000);
    }
}
