"""What a run survives, and the file that makes it so.

A kill at any moment: `checkpoint` saves whole states or none, `retention` keeps the latest and the best, `restore` reads
the latest one that is what was saved, and `resume` says which keys of the config may have changed since. Damaged files and
full disks: `checksums` cover the files and `fingerprints` the arrays of a checkpoint; the one before takes the place of a
damaged one, and a save that fails is reported and leaves nothing half-written (`orbax_logs` silences the library). Two runs
in one folder: `lock`. Signals, and everything else that ends a run: `stop_reasons`. A process that dies: `lost_process`.
Data that are late or cannot be read: `batch_reader`. Divergence: `spikes` decides in the compiled step which batches are
skipped, `rollback` restores an earlier checkpoint, `diagnosis` names where values stopped being finite, and `collapse`
watches routers. A bucket instead of a folder: `staging`. What can be set is in `checkpoint.CheckpointConfig` and
`recovery.RecoveryConfig`.
"""
