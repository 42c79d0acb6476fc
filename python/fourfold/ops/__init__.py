"""Public functions, one file per family: argument errors, fakes, gradients, vmap."""
