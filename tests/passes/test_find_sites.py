"""Sites by use-def: on graphs written by hand, one rule at a time, and on exports of real models by every exporter."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper, parser

from loracc.errors import InputError
from loracc.passes.find_sites import find_sites
from loracc.sites import SITES_KEY, TRANSPOSED, Layout, Site, write_records

Found = tuple[str, str, tuple[int, ...], str]


def graph(body: str, *, scopes: dict[str, str] | None = None, **shapes: tuple[int, ...]) -> ir.Model:
    """A model of these nodes. ``shapes`` are its float initializers, ``__`` in a name stands for a dot.

    Args:
        body: Nodes in ONNX's text syntax, from x to y.
        scopes: Module path by node name, as torch's exporter leaves it.
        shapes: Shape by initializer.
    """
    head = '<ir_version: 10, opset_import: ["": 18, "com.microsoft": 1]> g (float[N, 4] x) => (float[N, M] y)'
    proto = parser.parse_model(f"{head} {{ {body} }}")
    for name, shape in shapes.items():
        proto.graph.initializer.append(numpy_helper.from_array(np.zeros(shape, np.float32), name.replace("__", ".")))
    for node in proto.graph.node:
        if scopes and node.name in scopes:
            entry = node.metadata_props.add()
            entry.key, entry.value = "pkg.torch.onnx.name_scopes", repr(["", scopes[node.name], "op"])
    return ir.from_proto(proto)


def found(model: ir.Model) -> list[Found]:
    """(name, kind, permutation, source) of each site."""
    return [(site.name, site.kind, site.layout.perm, site.source) for site in find_sites(model)]


T = (1, 0)


@pytest.mark.parametrize(
    ("body", "shape", "expected"),
    [
        ('y = MatMul (x, "fc.weight")', (4, 3), ("linear", T)),
        ('y = MatMul ("fc.weight", x)', (3, 4), ("linear", ())),
        ('t = Transpose <perm = [1, 0]> ("fc.weight") y = MatMul (x, t)', (3, 4), ("linear", ())),
        ('t = Transpose ("fc.weight") y = MatMul (x, t)', (3, 4), ("linear", ())),
        (
            't = Transpose ("fc.weight") i = Identity (t) c = Cast <to = 10> (i) y = MatMul (x, c)',
            (3, 4),
            ("linear", ()),
        ),
        ('t = Transpose ("fc.weight") u = Transpose (t) y = MatMul (x, u)', (4, 3), ("linear", T)),
        ('y = Gemm (x, "fc.weight")', (4, 3), ("linear", T)),
        ('y = Gemm <transB = 1> (x, "fc.weight")', (3, 4), ("linear", ())),
        ('y = Gemm ("fc.weight", x)', (3, 4), ("linear", ())),
        ('y = Gemm <transA = 1> ("fc.weight", x)', (4, 3), ("linear", T)),
        ('t = Transpose ("fc.weight") y = Gemm <transB = 1> (x, t)', (4, 3), ("linear", T)),
        ('y = com.microsoft.FusedMatMul <transB = 1> (x, "fc.weight")', (3, 4), ("linear", ())),
        ('y = Einsum <equation = "nd,df->nf"> (x, "fc.weight")', (4, 3), ("linear", T)),
        ('y = Einsum <equation = "nd,fd->nf"> (x, "fc.weight")', (3, 4), ("linear", ())),
        ('y = Gather ("fc.weight", x)', (9, 4), ("embedding", ())),
        ('y = Gather <axis = 1> ("fc.weight", x)', (9, 4), ("other", ())),
        ('y = Conv (x, "fc.weight")', (4, 3, 3), ("conv", ())),
        ('y = Conv (x, "fc.weight")', (4, 3, 3, 3), ("conv", ())),
        ('y = Conv (x, "fc.weight")', (4, 3, 3, 3, 3), ("conv", ())),
        ('y = ConvTranspose (x, "fc.weight")', (4, 3, 3, 3), ("conv_transpose", ())),
        ('y = LayerNormalization (x, "fc.weight")', (4,), ("norm", ())),
        ('y = MatMul (x, "fc.weight")', (5, 4, 3), ("experts", ())),
        ('y = Gather ("fc.weight", x)', (5, 4, 3), ("experts", ())),
        ('y = Einsum <equation = "nd,edf->nef"> (x, "fc.weight")', (5, 4, 3), ("experts", ())),
        ('y = Add (x, "fc.weight")', (2, 4), ("other", ())),
        ('c = Cast <to = 7> ("fc.weight") y = MatMul (x, c)', (4, 3), ("other", ())),  # no float any more: what of it?
        ('r = Reshape ("fc.weight", x) y = MatMul (x, r)', (3, 4), ("other", ())),
    ],
)
def test_kind_and_orientation(body: str, shape: tuple[int, ...], expected: tuple[str, tuple[int, ...]]) -> None:
    body = body.replace('"fc.weight"', "w")
    model = graph(body, w=shape)
    value = model.graph.initializers["w"]
    value.name = "fc.weight"
    assert [(s.name, s.kind, s.layout.perm) for s in find_sites(model)] == [("fc.weight", *expected)]


def test_canonical_shapes_are_torchs() -> None:
    model = graph("[a] h = MatMul (x, l1.weight) [b] y = Gemm <transB = 1> (h, l2.weight, l2.bias)".replace(".", "_"),
                  l1_weight=(4, 3), l2_weight=(5, 3), l2_bias=(5,))  # fmt: skip
    for name in list(model.graph.initializers):
        model.graph.initializers[name].name = name.replace("_", ".")
    shapes = {
        s.name: s.layout.canonical_shape([4, 3] if s.module == "l1" else [5, 3])
        for s in find_sites(model)
        if s.kind == "linear"
    }
    assert shapes == {"l1.weight": (3, 4), "l2.weight": (5, 3)}


def rename(model: ir.Model, **names: str) -> ir.Model:
    """Give initializers names that the text syntax cannot spell."""
    for old, new in names.items():
        model.graph.initializers[old].name = new
    return model


def test_bias_of_a_later_add_is_a_bias_and_of_any_other_add_is_not() -> None:
    model = graph("h = MatMul (x, w) i = Identity (h) a = Add (i, b) y = Add (a, p)", w=(4, 3), b=(3,), p=(3,))
    rename(model, w="fc.weight", b="fc.bias", p="pos.table")
    assert found(model) == [
        ("fc.weight", "linear", T, "name"),
        ("fc.bias", "bias", (), "name"),
        ("pos.table", "other", (), "name"),
    ]


def test_a_nameless_weight_is_named_by_its_bias_then_by_its_scope() -> None:
    body = "[/a/MatMul] h = MatMul (x, w) [/a/Add] i = Add (b, h) [/b/c.0/MatMul] y = MatMul (i, v)"
    body = body.replace("[/a/MatMul]", "[n1]").replace("[/a/Add]", "[n2]").replace("[/b/c.0/MatMul]", "[n3]")
    model = rename(
        graph(body, w=(4, 3), b=(15,), v=(3, 3)), w="onnx::MatMul_9", b="mha.in_proj_bias", v="onnx::MatMul_7"
    )
    for node, name in zip(model.graph, ("/mha/MatMul", "/mha/Add", "/b/c.0/MatMul"), strict=True):
        node.name = name
    assert found(model) == [
        ("mha.in_proj_weight", "linear", T, "name"),
        ("mha.in_proj_bias", "bias", (), "name"),
        ("b.c.0.weight", "linear", T, "scope"),
    ]


def test_a_weight_that_nothing_names_is_listed_without_a_module() -> None:
    model = rename(graph("[n] h = MatMul (x, w) y = Mul (h, s)", w=(4, 3), s=(3,)), w="val_7", s="val_8")
    assert found(model) == [("weight", "linear", T, "")]
    assert [site.module for site in find_sites(model)] == [""]


def test_tied_embedding_is_two_sites_on_one_initializer() -> None:
    model = graph(
        "[g] e = Gather (w, x) [t] wt = Transpose (w) [m] y = MatMul (e, wt)",
        scopes={"g": "model.embed", "t": "lm_head", "m": "lm_head"},
        w=(9, 4),
    )
    rename(model, w="model.embed.weight")
    assert [(s.name, s.kind, s.consumer, s.source) for s in find_sites(model)] == [
        ("model.embed.weight", "embedding", "g", "name"),
        ("lm_head.weight", "linear", "t", "scope"),
    ]


def test_a_copy_that_an_optimizer_made_leaves_the_embedding_its_own_name() -> None:
    """torch's optimizer folds the head's transpose into a copy; the embedding keeps the head's name."""
    model = graph(
        "[g] e = Gather (w, x) [m] y = MatMul (e, c)",
        scopes={"g": "transformer.wte", "m": "lm_head"},
        w=(9, 4), c=(4, 9),
    )  # fmt: skip
    rename(model, w="lm_head.weight", c="val_3")
    assert found(model) == [
        ("transformer.wte.weight", "embedding", (), "scope"),
        ("lm_head.weight", "linear", T, "scope"),
    ]


def test_a_name_that_no_reader_agrees_with_is_believed() -> None:
    """T5 gives one ``shared`` embedding to encoder and decoder, and its values to the head."""
    model = graph(
        "[g] e = Gather (w, x) [d] f = Gather (w, x) [t] wt = Transpose (w) [m] h = MatMul (e, wt) y = Add (h, f)",
        scopes={"g": "encoder.embed_tokens", "d": "decoder.embed_tokens", "t": "lm_head", "m": "lm_head"},
        w=(9, 4),
    )
    rename(model, w="shared.weight")
    assert [(s.name, s.consumer) for s in find_sites(model)] == [
        ("shared.weight", "g"),
        ("shared.weight", "d"),
        ("lm_head.weight", "t"),
    ]


def test_equal_tensors_that_were_merged_are_one_site_per_reader() -> None:
    model = graph(
        "[a] h = Gemm (x, w, z) [b] i = Gemm (h, v, z) [c] y = LayerNormalization (i, s, z)",
        scopes={"a": "l.0", "b": "l.1", "c": "norm"},
        w=(4, 4), v=(4, 4), z=(4,), s=(4,),
    )  # fmt: skip
    rename(model, w="l.0.weight", v="l.1.weight", z="l.0.bias", s="norm.weight")
    merged = [(s.name, s.kind, s.consumer, s.source) for s in find_sites(model) if s.initializer == "l.0.bias"]
    assert merged == [
        ("l.0.bias", "bias", "a", "name"),
        ("l.1.bias", "bias", "b", "name"),
        ("norm.bias", "norm", "c", "scope"),
    ]


def test_identities_of_the_torchscript_exporter_keep_the_names_of_merged_tensors() -> None:
    model = graph("[i] z1 = Identity (z) [a] h = Gemm (x, w, z) [b] y = Gemm (h, v, z1)", w=(4, 4), v=(4, 4), z=(4,))
    rename(model, w="l.0.weight", v="l.1.weight", z="l.0.bias")
    next(node for node in model.graph if node.name == "i").outputs[0].name = "l.1.bias"
    assert [(s.name, s.consumer) for s in find_sites(model) if s.kind == "bias"] == [
        ("l.1.bias", "i"),
        ("l.0.bias", "a"),
    ]


def test_a_module_called_twice_is_one_site() -> None:
    model = graph("[n1] h = MatMul (x, w) [n2] y = MatMul (h, w)", w=(4, 4))
    for node, name in zip(model.graph, ("/head/MatMul", "/head_1/MatMul"), strict=True):
        node.name = name
    rename(model, w="head.weight")
    assert [(s.name, s.consumer) for s in find_sites(model)] == [("head.weight", "")]


def test_asking_for_the_shape_is_no_reading() -> None:
    model = rename(graph("s = Shape (w) c = Conv (x, w) y = Reshape (c, s)", w=(4, 3, 3)), w="c.weight")
    assert [(s.name, s.kind, s.consumer) for s in find_sites(model)] == [("c.weight", "conv", "")]


@pytest.mark.parametrize("name", ["conv.weight", "onnx::Conv_12"])
def test_a_weight_with_a_norm_folded_in_is_not_the_parameter(name: str) -> None:
    """Its values are W·γ/σ: a delta of the original weight must not be added to them."""
    model = rename(graph("[c] y = Conv (x, w)", scopes={"c": "bn"}, w=(4, 3, 3, 3)), w=name)
    assert [(s.module, s.kind, s.source) for s in find_sites(model)] in ([("", "conv", "")], [])
    assert "conv" not in {s.module for s in find_sites(model)}


def test_a_functional_call_on_a_childs_weight_keeps_its_name() -> None:
    model = graph("[m] y = Gemm <transB = 1> (x, w)", scopes={"m": "model.attn"}, w=(4, 4))
    assert found(rename(model, w="attn.out_proj.weight")) == [("attn.out_proj.weight", "linear", (), "name")]


def test_calls_of_the_models_own_functions_are_stepped_into() -> None:
    text = """<ir_version: 10, opset_import: ["": 18, "local": 1]>
    g (float[N, 4] x, float[4, 3] w, float[3] b) => (float[N, 3] y) { y = local.linear (x, w, b) }
    <domain: "local", opset_import: ["": 18]>
    linear (p, q, r) => (s) { h = MatMul (p, q) s = Add (h, r) }"""
    proto = parser.parse_model(text)
    for value in list(proto.graph.input)[1:]:
        shape = [d.dim_value for d in value.type.tensor_type.shape.dim]
        proto.graph.initializer.append(numpy_helper.from_array(np.zeros(shape, np.float32), value.name))
    del proto.graph.input[1:]
    proto.graph.node[0].name = "/layers.0/fc/linear"
    model = ir.from_proto(proto)
    rename(model, w="val_1", b="val_2")
    assert found(model) == [("layers.0.fc.weight", "linear", T, "scope"), ("layers.0.fc.bias", "bias", (), "scope")]


def test_names_of_the_genai_builder_drop_the_op() -> None:
    model = rename(graph("y = MatMul (x, w)", w=(4, 3)), w="model.layers.0.attn.q_proj.MatMul.weight")
    assert found(model) == [("model.layers.0.attn.q_proj.weight", "linear", T, "name")]


def test_integer_and_scalar_initializers_hold_no_sites() -> None:
    model = rename(graph("y = Mul (x, w)", w=()), w="temperature.scale")
    integers = ir.Value(name="i.table", const_value=ir.tensor(np.zeros(3, np.int64)), shape=ir.Shape([3]))
    integers.dtype = ir.DataType.INT64
    model.graph.register_initializer(integers)
    assert found(model) == []


# -- records


def recorded() -> ir.Model:
    model = graph("[a] h = MatMul (x, w) [b] y = MatMul (h, v)", w=(4, 12), v=(12, 3))
    rename(model, w="val_1", v="b.weight")
    blocks = [
        Site("attn.q", "weight", "linear", "val_1", Layout((1, 0), 0, 8)),
        Site("attn.k", "weight", "linear", "val_1", Layout((1, 0), 8, 12)),
    ]
    write_records(model, blocks)
    return model


def test_records_come_first_and_the_rest_is_found() -> None:
    sites = list(find_sites(recorded()))
    assert [(s.name, s.source, s.layout) for s in sites] == [
        ("attn.q.weight", "recorded", Layout((1, 0), 0, 8)),
        ("attn.k.weight", "recorded", Layout((1, 0), 8, 12)),
        ("b.weight", "name", TRANSPOSED),
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"initializer": "gone"},
        {"layout": {"perm": [0, 1, 2], "start": 0, "stop": None}},
        {"layout": {"perm": [0, 0], "start": 0, "stop": None}},
        {"layout": {"perm": [1, 0], "start": 0, "stop": 13}},
        {"layout": {"perm": [1, 0], "start": -1, "stop": None}},
        {"layout": {"perm": [1, 0], "start": 12, "stop": None}},
        {"consumer": "gone"},
    ],
)
def test_records_that_no_longer_fit_are_not_believed(change: dict[str, Any]) -> None:
    model = recorded()
    records = json.loads(model.metadata_props[SITES_KEY])
    model.metadata_props[SITES_KEY] = json.dumps([{**records[0], **change}])
    assert [(s.name, s.source) for s in find_sites(model)] == [("weight", ""), ("b.weight", "name")]


@pytest.mark.parametrize("text", ["{", "3", "[3]", '[{"module": "a"}]', '[{"layout": 3}]', "[" * 100_000])
def test_malformed_records_are_an_error(text: str) -> None:
    model = recorded()
    model.metadata_props[SITES_KEY] = text
    with pytest.raises(InputError, match="record of its sites is malformed"):
        find_sites(model)


def test_no_weight_is_read() -> None:
    model = graph("y = MatMul (x, w)", w=(4, 3))

    def never() -> ir.TensorProtocol:
        raise AssertionError("a weight was read")

    value = model.graph.initializers["w"]
    value.const_value = ir.LazyTensor(never, ir.DataType.FLOAT, ir.Shape([4, 3]), name="w")
    assert len(find_sites(model)) == 1


# -- what exporters really write


def exported(model: Any, args: tuple[Any, ...], how: str) -> ir.Model:
    """The model as one of torch's exporters writes it."""
    import torch

    if how == "torchscript":
        buffer = io.BytesIO()
        torch.onnx.export(model, args, buffer, dynamo=False, opset_version=17)  # type: ignore[arg-type]  # a file works
        return ir.from_proto(onnx.load_from_string(buffer.getvalue()))
    program = torch.onnx.export(model, args, dynamo=True, optimize=how == "optimized", verbose=False)
    assert program is not None
    return program.model


def _wrapped(model: Any) -> Any:
    """The model under a module of ours that returns its first output, as people wrap it for the exporter."""
    import torch

    class Wrapper(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> Any:
            return self.model(input_ids=ids, attention_mask=mask, use_cache=False)[0]

    return Wrapper().eval()


HOW = ["optimized", "plain", "torchscript"]
pytestmark = [
    # The TorchScript exporter is deprecated, and calls deprecated functions of its own; files of it are still made.
    pytest.mark.filterwarnings("ignore:You are using the legacy TorchScript-based ONNX export:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The feature will be removed:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Exporting aten.*index operator of advanced indexing:UserWarning"),
    # Masks branch on shapes, which tracing says.
    pytest.mark.filterwarnings("ignore:Converting a tensor to a Python boolean:torch.jit.TracerWarning"),
    # torch's exporter copies its own tree specifications in a deprecated way.
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec:FutureWarning"),
]
#: Parameters that the exporter evaluated away: it saw constant positions, looked them up and kept only the result.
_EVALUATED = {("gpt2", "optimized"): {"model.transformer.wpe.weight"}}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_every_parameter_of_a_transformer_is_found(family: str, how: str) -> None:
    """Each parameter is a site under its own name, of the right kind, and the site's view is the parameter's value."""
    import torch

    from tests.models import build

    wrapper = _wrapped(build(family))
    ids = torch.randint(3, 99, (2, 7))
    model = exported(wrapper, (ids, torch.ones_like(ids)), how)
    sites = {(site.name, site.kind): site for site in find_sites(model)}
    assert {site.source for site in sites.values()} <= {"name", "scope"}
    missing = set()
    for name, kind, value in _parameters(wrapper):
        if ".pooler." in name:  # no part of the first output: the exporter drops it
            continue
        site = sites.get((name, kind))
        if site is None:
            missing.add(name)
            continue
        tensor = model.graph.initializers[site.initializer].const_value
        assert tensor is not None
        np.testing.assert_array_equal(site.layout.view(tensor.numpy()), value, err_msg=name)
    assert missing == _EVALUATED.get((family, how), set())


def _parameters(module: Any) -> list[tuple[str, str, np.ndarray]]:
    """(name, kind, canonical value) of every parameter, under every name that a tied one has."""
    kinds = {"Linear": "linear", "Conv1D": "linear", "Embedding": "embedding", "Conv2d": "conv"}
    found = []
    for path, child in module.named_modules():
        for leaf, value in child.named_parameters(recurse=False):
            kind = kinds.get(type(child).__name__, "norm")
            if leaf == "bias" and kind != "norm":
                kind = "bias"
            array = value.detach().numpy()
            transposed = type(child).__name__ == "Conv1D" and leaf == "weight"
            found.append((f"{path}.{leaf}", kind, array.T if transposed else array))
    return found


@pytest.mark.parametrize("how", HOW)
def test_every_parameter_of_a_conv_net_is_found(how: str) -> None:
    import torch

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = torch.nn.Conv1d(3, 8, 3, padding=1)
            self.folded = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.BatchNorm2d(4))
            self.up = torch.nn.ConvTranspose2d(4, 2, 2, stride=2)
            self.head = torch.nn.Linear(512, 6)
            self.attention = torch.nn.MultiheadAttention(6, 2, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.up(self.folded(self.stem(x).unsqueeze(1)))
            y = torch.tanh(self.head(y.flatten(1)))[:, None, :]
            return self.attention(y, y, y, need_weights=False)[0]

    torch.manual_seed(0)
    net = Net()
    net.folded[1].running_var.copy_(torch.rand(4) + 0.5)  # type: ignore[operator]
    net = net.eval()
    model = exported(net, (torch.randn(2, 3, 8),), how)
    sites = {site.name: site for site in find_sites(model)}
    state = {name: value.numpy() for name, value in net.state_dict().items() if value.ndim}
    named = {name for name, site in sites.items() if site.source}
    folded = {"folded.0.weight", "folded.0.bias"}
    for name in named:
        site = sites[name]
        tensor = model.graph.initializers[site.initializer].const_value
        assert tensor is not None
        np.testing.assert_array_equal(site.layout.view(tensor.numpy()), state[name], err_msg=name)
    norm = {name for name in state if name.startswith("folded.1.")}
    zero = {name for name, value in state.items() if not value.any()}
    wanted = set(state) - norm - zero
    assert named - norm - zero == (wanted if how == "plain" else wanted - folded)
