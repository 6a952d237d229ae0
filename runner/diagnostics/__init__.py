"""What tells of the machine and of promises: benchmarks, and a resumed run beside an uninterrupted one."""
