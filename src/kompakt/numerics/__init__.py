"""The mathematics: functions from tensors to tensors; no modules, no I/O."""
