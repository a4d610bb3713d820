"""Operands reach the products as their producers wrote them.

Whatever quantizes or dispatches writes values and scales in the layout the kernels read, so between
a producer and a product there is no transpose, copy, pad or convert: shown for a mixture-of-experts
layer's forward and backward pass, in what JAX hands to XLA (on any machine) and in what XLA makes
of it (on the GPU).

One operand may be an exception: the scales that `dispatch` delivers row by row, as they travelled,
1/32 of the bytes of their values.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import pytest

from jax_ds import moe
from tests.moe import cases

CASE = cases.MoECase("one device", (1,), tokens=256, hidden=512, ffn=256, experts=4, k=2)
# Forward: two grouped products and two dense ones of the shared expert. Backward: two for each.
PRODUCTS = 12
QUANTIZED = 4  # the first operands of a product: values and scales, lhs and rhs
LHS_SCALES, DISPATCH = 1, "jax_ds_deep_ep_dispatch"
SAME = ("get-tuple-element", "bitcast")  # operations that compute nothing


def _traced() -> Any:
    inputs = cases.inputs(CASE)
    layer = jax.shard_map(
        lambda x, params: moe.moe_layer(x, params, **CASE.layer)[0],
        mesh=cases.make_mesh(CASE),
        in_specs=(jax.P(CASE.axis_name), cases.param_specs(CASE, inputs.params)),
        out_specs=jax.P(CASE.axis_name),
    )

    @jax.jit
    def run(x: Any, params: Any, cotangent: Any) -> Any:
        y, vjp = jax.vjp(layer, x, params)
        return y, vjp(cotangent)

    return run.trace(*inputs)


def test_products_read_what_producers_wrote() -> None:
    module = _traced().lower(lowering_platforms=("cuda",)).compiler_ir()
    functions = {
        op.attributes["sym_name"].value: op
        for op in _operations(module.operation)
        if op.name == "func.func"
    }
    products = [op for op in _operations(module.operation) if _target(op) == "jax_ds_gemm"]
    assert len(products) == PRODUCTS
    for product in products:
        wanted = _layouts(product, "operand_layouts")
        for i in range(QUANTIZED):
            producer, result = _producer(product.operands[i], functions)
            assert _target(producer).startswith("jax_ds_"), f"operand {i} of {product}: {producer}"
            if (i, _target(producer)) != (LHS_SCALES, DISPATCH):
                assert _layouts(producer, "result_layouts")[result] == wanted[i]


@pytest.mark.gpu
def test_compiled_products_read_what_producers_wrote() -> None:
    # A command buffer would hide its operands behind parameters.
    options = {"xla_gpu_graph_min_graph_size": 1 << 30}
    text = _traced().lower().compile(compiler_options=options).as_text()
    assert text is not None
    definitions = {
        match["name"]: match
        for match in re.finditer(
            r"^\s*(?:ROOT )?%(?P<name>[\w.-]+) = (?P<type>.*?) (?P<op>[\w-]+)\((?P<operands>.*)$",
            text,
            re.MULTILINE,
        )
    }
    products = [m for m in definitions.values() if 'custom_call_target="jax_ds_gemm"' in m[0]]
    assert len(products) == PRODUCTS
    for product in products:
        names = re.findall(r"%([\w.-]+)", product["operands"].split("), ")[0])
        for i, name in enumerate(names[:QUANTIZED]):
            producer = _definition(definitions, name, SAME)
            if i == LHS_SCALES and producer["op"] in ("fusion", "copy"):
                producer = _definition(definitions, name, (*SAME, "fusion", "copy"))
                assert producer["op"] == "call-done"
            # What is on the stream of the collectives is the exchange between devices.
            exchanged = producer["op"] == "call-done" and '"collective"' in producer[0]
            assert exchanged or 'custom_call_target="jax_ds_' in producer[0], (
                f"{product[0]}\nreads\n{producer[0]}"
            )


def _definition(definitions: dict[str, Any], name: str, through: Sequence[str]) -> Any:
    """What `%name` is, seen through these operations, and through tuples that are taken apart."""
    element = None  # of the tuple that `name` is
    while True:
        found = definitions[name]
        operands = re.findall(r"%([\w.-]+)", found["operands"].split("), ")[0])
        if found["op"] == "tuple" and element is not None:
            name, element = operands[element], None
        elif found["op"] in through:
            if found["op"] == "get-tuple-element":
                element = int(re.findall(r"index=(\d+)", found["operands"])[-1])
            name = operands[0]
        else:
            return found


def _operations(operation: Any) -> Iterator[Any]:
    """Every operation inside, at any depth."""
    for region in operation.regions:
        for block in region.blocks:
            for op in block.operations:
                yield op.operation
                yield from _operations(op.operation)


def _target(op: Any) -> str:
    if op.name != "stablehlo.custom_call":
        return ""
    name: str = op.attributes["call_target_name"].value
    return name


def _layouts(op: Any, attribute: str) -> Sequence[str]:
    return [str(layout) for layout in op.attributes[attribute]]


def _producer(value: Any, functions: dict[str, Any]) -> tuple[Any, int]:
    """The operation that computes `value`, and which of its results that is.

    Looks into the branch of a choice by platform (all branches but one are gone when the program is
    lowered for one) and into functions.
    """
    owner, result = value.owner, value.result_number
    owner = getattr(owner, "operation", owner)
    while True:
        if (
            _target(owner) == "annotate_device_placement"  # what compute_on leaves: no operation
            or owner.name == "stablehlo.optimization_barrier"  # orders, and moves nothing
        ):
            inner = owner.operands[result]
        elif owner.name == "func.call":
            inner = _results(functions[owner.attributes["callee"].value].regions[0])[result]
        elif owner.name == "stablehlo.case":
            (region,) = owner.regions
            inner = _results(region)[result]
        else:
            return owner, result
        owner, result = getattr(inner.owner, "operation", inner.owner), inner.result_number


def _results(region: Any) -> Any:
    *_, last = region.blocks[0].operations
    return last.operation.operands
