"""Parts of the MovieLens demo: the data, the model, the process that serves it, and printing."""
