//! Block device ioctls: sizes, sector sizes, partitions by hand (BLKPG), locks.
