"""Kernels of the decode loop: the reference in plain JAX is the specification; they know nothing of
`jspec`."""
