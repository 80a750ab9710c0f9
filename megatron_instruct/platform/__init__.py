"""The seam between megatron-core and the machine it runs on: CPU with gloo, or CUDA with NCCL.

`current()` says which machine this is; `initialize()` joins the process group and, without CUDA, replaces the few symbols
that megatron-core needs replaced (cpu_seam.py lists them). With CUDA nothing is replaced.
"""
