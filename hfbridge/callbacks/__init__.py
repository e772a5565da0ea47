"""Lightning callbacks that keep the state, evaluations, checkpoints and progress of a run of HFModule."""
