"""What a step will cost: arithmetic on a model's sizes (`sdft plan`) and a simulation of the pipeline."""
