"""How good a model is: perplexity by the paper's protocol, and the tasks of lm-eval."""
