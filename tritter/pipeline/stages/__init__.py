"""The stages of a run, one file each; `tritter.pipeline.pipeline` has them in order."""
