"""What an H100 or H200 would get, from the compiler alone: no spills, the right instructions."""

import re
from typing import Any

import pytest
from stream_kernels.gpu import (
    attention,
    block_stats,
    choose,
    linear_logp,
    prefix_fused,
    prefix_split,
    top_k_top_p,
)
from stream_kernels.gpu.launch import tile_options
from stream_kernels.gpu.scores import BLOCK

from tests.kernels.sm90 import Compiled, compile_for_sm90

# A multiprocessor of an H100 has 65536 registers and 227 KB of shared memory for its programs.
REGISTERS, SHARED_BYTES = 65536, 227 << 10

ROWS = {"row_slots": "*i32", "suffix_lengths": "*i32", "scale_log2": "fp32"}
PREFIX = {
    "query": "*bf16",
    "prefix_key": "*bf16",
    "prefix_value": "*bf16",
    "prefix_spans": "*i32",
    "group_rows": "*i32",
    "prefix_head_stride": "i32/16",
    "group_size": "i32",
}
SUFFIX = {
    "query": "*bf16",
    "suffix_key": "*bf16",
    "suffix_value": "*bf16",
    "slot_stride": "i32/16",
    "slot_head_stride": "i32/16",
    "out": "*bf16",
}
PARTIAL = {"partial": "*fp32", "partial_lse": "*fp32", "num_rows": "i32"}
SAMPLE = {
    "logits": "*bf16",
    "scores": "*bf16",
    "allowed": "*i8",
    "stats": "*fp32",
    "cutoffs": "*i64",
    "uniforms": "*fp64",
    "tokens": "*i64",
    "logps": "*fp32",
    "logits_stride": "i32/16",
    "scores_stride": "i32/16",
    "vocab_size": "i32/16",
    "num_rows": "i32/16",
    "num_blocks": "i32",
    "inverse_temperature": "fp32",
    "top_k": "i32",
    "top_p": "fp32",
}
ATTENTION = {
    "query": "*bf16",
    "key": "*bf16",
    "value": "*bf16",
    "key_lengths": "*i64",
    "out": "*bf16",
    "lse": "*fp32",
    "batch_stride": "i32/16",
    "head_stride": "i32/16",
    "key_stride": "i32/16",
    "scale_log2": "fp32",
    "num_rows": "i32",
    "num_queries": "i32",
    "num_keys": "i32",
}
LINEAR_LOGP = {
    "hidden": "tensordesc<bf16[128, 64]>",
    "weight": "tensordesc<bf16[256, 64]>",
    "bias": "*bf16",
    "targets": "*i64",
    "parts": "*fp32",
    "num_tokens": "i32",
    "vocab_size": "i32",
    "size": "i32/16",
    "row_tiles": "i32",
    "splits": "i32",
    "tiles_each": "i32",
    "logit_scale": "fp32",
    "softcap": "fp32",
}


def build(
    kernel: Any, arguments: dict[str, str], options: dict[str, Any], *, most_spills: int = 0
) -> Compiled:
    constants = {name: value for name, value in options.items() if name in kernel.arg_names}
    needed = {name: kind for name, kind in arguments.items() if name in kernel.arg_names}
    compiled = compile_for_sm90(
        kernel,
        needed,
        constants,
        num_warps=options["num_warps"],
        num_stages=options["num_stages"],
    )
    assert compiled.spills <= most_spills and compiled.stack_bytes <= 8 * most_spills
    assert compiled.shared_bytes <= SHARED_BYTES
    return compiled


def in_float32(arguments: dict[str, str]) -> dict[str, str]:
    return {name: kind.replace("bf16", "fp32") for name, kind in arguments.items()}


def compile_for_ones(kernel: Any, arguments: dict[str, str], options: dict[str, Any]) -> None:
    """As the launcher compiles when every count is 1: a constant, where it may specialise."""
    counts = {
        parameter.name: 1
        for parameter in kernel.params
        if arguments.get(parameter.name, "").startswith("i32")
        and "stride" not in parameter.name
        and not parameter.do_not_specialize
    }
    names = {name for name in kernel.arg_names if name in arguments} - counts.keys()
    constants = {name: value for name, value in options.items() if name in kernel.arg_names}
    compile_for_sm90(
        kernel,
        {name: arguments[name] for name in names},
        constants | counts,
        num_warps=options["num_warps"],
        num_stages=options["num_stages"],
    )


def programs_that_fit(compiled: Compiled, num_warps: int) -> int:
    by_registers = REGISTERS // (compiled.registers * 32 * num_warps)
    return min(by_registers, SHARED_BYTES // (compiled.shared_bytes + 1024))


@pytest.mark.parametrize(
    ("heads", "size", "group_size", "side_by_side"),
    [
        pytest.param(32, 128, 10, 2, id="llava-7b"),
        pytest.param(32, 128, 20, 1, id="twenty-rows"),
        pytest.param(12, 64, 10, 3, id="small-heads"),
        pytest.param(16, 80, 10, 1, id="heads-of-80"),
        pytest.param(8, 256, 10, 1, id="heads-of-256"),
    ],
)
def test_fused_prefix_attention(heads: int, size: int, group_size: int, side_by_side: int) -> None:
    options = prefix_fused.fused_options(heads, size, heads, group_size, 2)
    compiled = build(prefix_fused.fused_kernel, PREFIX | SUFFIX | ROWS, options)
    assert compiled.tensor_core_instructions and compiled.loads_16_bytes
    assert programs_that_fit(compiled, options["num_warps"]) >= side_by_side


@pytest.mark.parametrize(
    ("heads", "kv_heads", "group_size"),
    [
        pytest.param(28, 4, 10, id="qwen2.5-vl-7b"),
        pytest.param(32, 32, 10, id="few-questions"),
        pytest.param(32, 8, 10, id="llama-3"),
    ],
)
def test_split_prefix_attention(heads: int, kv_heads: int, group_size: int) -> None:
    options = prefix_split.prefix_options(heads, 128, kv_heads, group_size, 2)
    compiled = build(prefix_split.prefix_kernel, PREFIX | PARTIAL | ROWS, options)
    assert compiled.tensor_core_instructions and compiled.loads_16_bytes
    options = prefix_split.suffix_options(heads, 128, kv_heads, 2, 2)
    compiled = build(prefix_split.suffix_kernel, SUFFIX | PARTIAL | ROWS, options)
    assert compiled.tensor_core_instructions and compiled.loads_16_bytes
    assert programs_that_fit(compiled, options["num_warps"]) >= 4


def test_counts_of_one_compile() -> None:
    """A single row, as in a model's first decode step: its kernels once failed to compile."""
    options: dict[str, Any] = prefix_fused.fused_options(32, 128, 32, 1, 2)
    compile_for_ones(prefix_fused.fused_kernel, PREFIX | SUFFIX | ROWS, options)
    options = prefix_split.prefix_options(32, 128, 32, 1, 2)
    compile_for_ones(prefix_split.prefix_kernel, PREFIX | PARTIAL | ROWS, options)
    options = prefix_split.suffix_options(32, 128, 32, 8, 2)
    compile_for_ones(prefix_split.suffix_kernel, SUFFIX | PARTIAL | ROWS, options)
    options = {"KV_HEADS": 32, "CAUSAL": True, "HAS_LENGTHS": True, "D": 128}
    options |= tile_options(1, 128, 2)
    compile_for_ones(attention.attention_kernel, ATTENTION, options)
    options = {"SAME": True, "PLAIN": False, "SUPPRESS": False, "num_warps": 4, "num_stages": 3}
    options |= {"BLOCK": BLOCK, "BLOCKS_A_PROGRAM": block_stats.BLOCKS_A_PROGRAM}
    compile_for_ones(block_stats.block_stats_kernel, SAMPLE, options)
    options = {"GREEDY": False, "FILTERED": True, "SUPPRESS": True, "MAX_BLOCKS": 256}
    options |= {"BLOCK": BLOCK, "num_warps": 4, "num_stages": 3}
    compile_for_ones(choose.choose_kernel, SAMPLE, options)
    options = {"USE_TOP_K": True, "USE_TOP_P": True, "SUPPRESS": True, "BITS": 16, "TILE": 4096}
    options |= {"BLOCK": BLOCK, "MAX_BLOCKS": 32, "num_warps": 8, "num_stages": 3}
    compile_for_ones(top_k_top_p.filter_kernel, SAMPLE, options)
    options = {"BLOCK_N": 128, "BLOCK_V": 256, "BLOCK_D": 64, "TOGETHER": 12}
    options |= {"HAS_BIAS": False, "HAS_SOFTCAP": False, "num_warps": 8, "num_stages": 3}
    compile_for_ones(linear_logp.logp_kernel, LINEAR_LOGP, options)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_with_lse(causal: bool) -> None:
    options: dict[str, Any] = tile_options(1500, 128, 2)
    options |= {"KV_HEADS": 32, "CAUSAL": causal, "HAS_LENGTHS": True, "D": 128}
    compiled = build(attention.attention_kernel, ATTENTION, options)
    assert "wgmma" in compiled.ptx and compiled.loads_16_bytes


@pytest.mark.parametrize("size", [80, 128, 256])
def test_float32_attention_keeps_its_products_in_registers(size: int) -> None:
    """In tiles of the half types it took 224 KB and 17,000 instructions that go to memory."""
    options: dict[str, Any] = tile_options(1500, size, 4)
    options |= {"KV_HEADS": 4, "CAUSAL": True, "HAS_LENGTHS": True, "D": size}
    build(attention.attention_kernel, in_float32(ATTENTION), options, most_spills=2)
    options = prefix_fused.fused_options(8, size, 8, 10, 4)
    build(prefix_fused.fused_kernel, in_float32(PREFIX | SUFFIX | ROWS), options)
    options = prefix_split.prefix_options(28, size, 4, 10, 4)
    build(prefix_split.prefix_kernel, in_float32(PREFIX | PARTIAL | ROWS), options)
    options = prefix_split.suffix_options(28, size, 4, 8, 4)
    build(prefix_split.suffix_kernel, in_float32(SUFFIX | PARTIAL | ROWS), options)


@pytest.mark.parametrize("same", [True, False], ids=["", "penalized"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_sampling_reads_the_logits_once_in_16_byte_loads(same: bool, dtype: str) -> None:
    options = {"SAME": same, "PLAIN": False, "SUPPRESS": False, "num_warps": 4, "num_stages": 3}
    options |= {"BLOCK": BLOCK, "BLOCKS_A_PROGRAM": block_stats.BLOCKS_A_PROGRAM}
    arguments = SAMPLE if dtype == "bf16" else in_float32(SAMPLE)
    compiled = build(block_stats.block_stats_kernel, arguments, options)
    reads = block_stats.BLOCKS_A_PROGRAM * (1 if same else 2) * (1 if dtype == "bf16" else 2)
    assert compiled.loads_16_bytes == reads
    assert compiled.registers <= 64  # 8 programs of 128 threads: enough loads in flight


@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize("filtered", [True, False])
def test_choosing_a_token_stays_in_registers(greedy: bool, filtered: bool) -> None:
    options = {"GREEDY": greedy, "FILTERED": filtered, "SUPPRESS": True, "MAX_BLOCKS": 256}
    options |= {"BLOCK": BLOCK, "num_warps": 4, "num_stages": 3}
    build(choose.choose_kernel, SAMPLE, options)


@pytest.mark.parametrize(("top_k", "top_p"), [(True, False), (False, True), (True, True)])
def test_filtering_reads_a_row_without_waiting(top_k: bool, top_p: bool) -> None:
    """Each 1024 columns were summed over all threads, with seven barriers; now a pass over the row
    is: of top-k one kind, of top-p two."""
    options: dict[str, Any] = {"USE_TOP_K": top_k, "USE_TOP_P": top_p, "SUPPRESS": False}
    options |= {"BITS": 32, "BLOCK": BLOCK, "TILE": top_k_top_p._TILE, "MAX_BLOCKS": 256}
    options |= {"num_warps": 8, "num_stages": 3}
    compiled = build(top_k_top_p.filter_kernel, in_float32(SAMPLE), options)
    reads = [len(re.findall(r"LDG\.E\.[\w.]*128", loop)) for loop in compiled.loops]
    waits = [len(re.findall(r"\bBAR\.", loop)) for loop in compiled.loops]
    passes = [wait for read, wait in zip(reads, waits, strict=True) if read == 4]
    assert passes.count(0) == top_k + 2 * top_p


@pytest.mark.parametrize(
    ("tiles", "extras"),
    [
        pytest.param((128, 256, 64, 8, 3), False, id="default"),
        pytest.param((128, 256, 64, 8, 3), True, id="bias-softcap"),
        pytest.param((128, 128, 64, 8, 3), False, id="smaller-tiles"),
    ],
)
def test_linear_logp_copies_by_tma_into_wgmma(tiles: Any, extras: bool) -> None:
    block_n, block_v, block_d, num_warps, num_stages = tiles
    options = {"BLOCK_N": block_n, "BLOCK_V": block_v, "BLOCK_D": block_d, "TOGETHER": 12}
    options |= {"HAS_BIAS": extras, "HAS_SOFTCAP": extras}
    arguments = LINEAR_LOGP | {
        "hidden": f"tensordesc<bf16[{block_n}, {block_d}]>",
        "weight": f"tensordesc<bf16[{block_v}, {block_d}]>",
    }
    options |= {"num_warps": num_warps, "num_stages": num_stages}
    compiled = build(linear_logp.logp_kernel, arguments, options)
    assert compiled.bulk_loads and "wgmma" in compiled.ptx
    assert compiled.shared_bytes <= SHARED_BYTES
