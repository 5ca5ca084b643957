"""Compiler options for small programs that run few times: compiled several times as fast.

A step of AcuLa with a tiny encoder has a thousand little loops. With LLVM's optimisation, XLA's
MLIR emitters and a module for each of 32 threads it takes 27 CPU seconds to compile, without them
5. What is left of the loops runs slower; products of matrices are those of a library either way.
"""

OPTIONS = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
}
# The same as XLA_FLAGS has them, for all programs of a process.
FLAGS = " ".join(f"--{name}={str(value).lower()}" for name, value in OPTIONS.items())
