"""Every Triton program compiles for real devices as it is launched, which needs no GPU.

Code that Triton's interpreter runs need not compile: loop variables that change shape, say.
"""

import os

import pytest
import torch

from groupsae.sae.kernels import cuda

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not cuda.available(), reason="needs Triton"),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"
    ),
]


class Recorder:
    """Stands for a program, and keeps what it is launched with."""

    def __init__(self, program, launches):
        self.program, self.launches = program, launches

    def __getitem__(self, grid):
        assert all(size > 0 for size in grid)
        return lambda *args, **options: self.launches.append((self.program, args, options))


@pytest.mark.parametrize(
    ("dtype", "d", "n", "capability"),
    [
        (torch.float32, 512, 40_000, 80),
        (torch.bfloat16, 2048, 16_384, 90),
        (torch.float64, 300, 100, 80),
    ],
    ids=str,
)
def test_every_program_compiles_as_it_is_launched(dtype, d, n, capability, tmp_path, monkeypatch):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from groupsae.sae.kernels import triton_programs

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    launches = []
    for name in ("combine", "dots", "project_rows", "normalize_rows"):
        program = getattr(triton_programs, name)
        monkeypatch.setattr(triton_programs, name, Recorder(program, launches))
    with torch.device("meta"):  # shapes only
        x, table = torch.empty(8, d, dtype=dtype), torch.empty(n, d, dtype=dtype)
        starts, picked = torch.empty(9, dtype=torch.int64), torch.empty(64, dtype=torch.int64)
        cuda.combine(torch.empty(64, dtype=dtype), picked, starts, table)
        cuda.dots(x, table, starts, picked)
        cuda.project_rows(table, table)
        cuda.normalize_rows(table)
    assert len(launches) == 4
    types = {"float64": "fp64", "float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
    types["int64"] = "i64"
    for program, args, options in launches:
        warps = {"num_warps": options.pop("num_warps")}
        signature = {
            name: f"*{types[str(arg.dtype).removeprefix('torch.')]}"
            if isinstance(arg, torch.Tensor)
            else "i32"
            for name, arg in zip(program.arg_names, args, strict=False)
        }
        source = ASTSource(
            program, signature | dict.fromkeys(options, "constexpr"), constexprs=options
        )
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=warps)
        assert compiled.asm["cubin"]
