//! From a layout and the disks that are there to mounted, empty file systems, and back to a table that boots, or not.
