"""A method turns rewards into an update of the policy: each has `train_epoch`."""
