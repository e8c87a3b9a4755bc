"""`sdft harness`: general abilities, by lm-evaluation-harness on this project's generators."""
