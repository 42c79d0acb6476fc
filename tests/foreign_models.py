"""Models of other libraries, and what swap does to each: the cases of test_foreign_models.py and of docs/models_swapped.md.

``python tests/foreign_models.py --write [PART_OF_A_NAME ...]`` runs them, or those so named, and writes their rows.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import functools
import importlib
import importlib.metadata
import io
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import fourfold as ff
import torch
from torch import Tensor, nn

PAGE = Path(__file__).parents[1] / "docs" / "models_swapped.md"
DENSITY = 0.5
#: Of the largest value; results are float32, and compilers add in another order.
CLOSE = 2e-5


# ---- the models ----------------------------------------------------------------------------------------------------------


def _transformers(kind: str, config: str, **sizes: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        library = importlib.import_module("transformers")
        return getattr(library, kind)(getattr(library, config)(num_labels=5, **sizes))

    return build


def _detr(kind: str, stages: int = 2, **sizes: Any) -> Callable[[], nn.Module]:
    """A head over a ResNet whose last stages it reads."""

    def build() -> nn.Module:
        library = importlib.import_module("transformers")
        resnet = {"hidden_sizes": [8, 16, 16][:stages], "depths": [1, 1, 1][:stages], "layer_type": "basic"}
        names = [f"stage{i}" for i in range(2, stages + 1)]
        backbone = library.ResNetConfig(embedding_size=8, out_features=names, **resnet)
        both = {
            f"{part}_{size}": n
            for part in ("encoder", "decoder")
            for size, n in {"attention_heads": 2, "ffn_dim": 64, "layers": 1}.items()
        }
        config = getattr(library, f"{kind}Config")(
            backbone_config=backbone, num_labels=5, d_model=32, num_queries=6, dropout=0.0, **{**both, **sizes}
        )
        return getattr(library, f"{kind}ForObjectDetection")(config)

    return build


def _timm(name: str, **sizes: Any) -> Callable[[], nn.Module]:
    return lambda: importlib.import_module("timm").create_model(name, pretrained=False, num_classes=5, **sizes)


def _timm_resnet() -> nn.Module:
    library = importlib.import_module("timm.models.resnet")
    return library.ResNet(library.BasicBlock, (1, 1, 1, 1), num_classes=5, channels=(8, 8, 16, 16))


def _torchvision_resnet() -> nn.Module:
    library = importlib.import_module("torchvision.models.resnet")
    return library.ResNet(library.BasicBlock, [1, 1, 1, 1], num_classes=5)


def _torchvision_vit() -> nn.Module:
    library = importlib.import_module("torchvision.models.vision_transformer")
    return library.VisionTransformer(32, 8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=5)


#: {library: {model: function that builds it}}: tiny, of random weights, and without dropout, so that a step can be repeated.
MODELS: Mapping[str, Mapping[str, Callable[[], nn.Module]]] = {
    "transformers": {
        "ResNet": _transformers(
            "ResNetForImageClassification",
            "ResNetConfig",
            embedding_size=8,
            hidden_sizes=[8, 16],
            depths=[1, 1],
            layer_type="basic",
        ),
        "ConvNeXt": _transformers(
            "ConvNextForImageClassification", "ConvNextConfig", num_stages=2, hidden_sizes=[8, 16], depths=[1, 1]
        ),
        "ViT": _transformers(
            "ViTForImageClassification",
            "ViTConfig",
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            image_size=32,
            patch_size=8,
        ),
        "Segformer": _transformers(
            "SegformerForSemanticSegmentation",
            "SegformerConfig",
            num_encoder_blocks=2,
            depths=[1, 1],
            sr_ratios=[2, 1],
            hidden_sizes=[16, 32],
            patch_sizes=[7, 3],
            strides=[4, 2],
            num_attention_heads=[1, 2],
            mlp_ratios=[2, 2],
            decoder_hidden_size=32,
            classifier_dropout_prob=0.0,
            drop_path_rate=0.0,
        ),
        "DETR": _detr("Detr", use_timm_backbone=False),
        "Conditional DETR": _detr("ConditionalDetr", use_timm_backbone=False, decoder_layers=2),
        "Deformable DETR": _detr(
            "DeformableDetr",
            stages=3,
            use_timm_backbone=False,
            num_feature_levels=2,
            encoder_n_points=2,
            decoder_n_points=2,
            decoder_layers=2,  # whose heads share their weights
        ),
    },
    "timm": {
        "ResNet": _timm_resnet,
        "ConvNeXt": _timm("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 16, 16, 16)),
        "ViT": _timm("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2),
        "EfficientNet": _timm("test_efficientnet", drop_path_rate=0.0),
    },
    "torchvision": {"ResNet": _torchvision_resnet, "ViT": _torchvision_vit},
}


def build(library: str, model: str, seed: int = 0) -> nn.Module:
    """In eval mode; every Parameter is drawn, so that no bias is zero and no branch scaled away."""
    torch.manual_seed(seed)
    made = MODELS[library][model]()
    with torch.no_grad():
        for p in made.parameters():
            p.normal_(0, (p[0].numel() if p.dim() > 1 else 30) ** -0.5)
    return made.eval()


def images() -> Tensor:
    return torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def sized(model: str) -> Tensor:
    """Images of the size that the model was built for."""
    return images()[..., :32, :32] if model == "ViT" else images()


# ---- the cases -----------------------------------------------------------------------------------------------------------

#: {how it is written: recipe}. SparseLinear's format is named: which one is fastest depends on the machine.
RECIPES: Mapping[str, Any] = {
    "coord_conv()": ff.recipes.coord_conv(),
    "coord_conv(with_r=True)": ff.recipes.coord_conv(with_r=True),
    "masked(density=0.5)": ff.recipes.masked(density=DENSITY),
    'supermask(sampler="topk", density=0.5)': ff.recipes.supermask(sampler="topk", density=DENSITY),
    'compress(format="bitmap")': ff.recipes.compress(format="bitmap"),
}
COORD, RADIUS, MASKED, SUPERMASK, COMPRESS = RECIPES
MASKING = (
    ff.nn.MaskedLinear,
    ff.nn.MaskedConv2d,
    ff.nn.SupermaskLinear,
    ff.nn.SupermaskConv2d,
    ff.nn.SparseLinear,
)


@dataclasses.dataclass(frozen=True)
class Case:
    """Swaps done to a model one after the other, each with the same where=."""

    library: str
    model: str
    swaps: tuple[str, ...]
    where: str | None = None
    quick: bool = False  # in the ordinary run of the tests too

    @property
    def name(self) -> str:
        return f"{self.library} {self.model}, {self.written}"

    @property
    def written(self) -> str:
        return " then ".join(f"`{swap}`" for swap in self.swaps) + ("" if self.where is None else f' in `"{self.where}"`')

    def build(self, seed: int = 0) -> nn.Module:
        return build(self.library, self.model, seed)

    def swap(self, model: nn.Module, example: Tensor | None = None) -> list[ff.SwapReport]:
        return [ff.swap(model, RECIPES[recipe], where=self.where, example=example) for recipe in self.swaps]


CASES = (
    Case("transformers", "ResNet", (COORD,), quick=True),
    Case("transformers", "ResNet", (MASKED,)),
    Case("transformers", "ConvNeXt", (RADIUS,)),
    Case("transformers", "ConvNeXt", (SUPERMASK,), quick=True),
    Case("transformers", "ViT", (COORD,)),
    Case("transformers", "ViT", (SUPERMASK,)),
    Case("transformers", "ViT", (MASKED, COMPRESS), quick=True),
    Case("transformers", "Segformer", (COORD,)),
    Case("transformers", "Segformer", (MASKED,), quick=True),
    Case("transformers", "Segformer", (MASKED, COMPRESS)),
    Case("transformers", "DETR", (COORD,), quick=True),
    Case("transformers", "DETR", (MASKED, COMPRESS)),
    Case("transformers", "Conditional DETR", (COORD,), where="model.input_projection"),
    Case("transformers", "Conditional DETR", (SUPERMASK,)),
    Case("transformers", "Deformable DETR", (COORD,)),
    Case("transformers", "Deformable DETR", (MASKED,)),
    Case("timm", "ResNet", (COORD,)),
    Case("timm", "ResNet", (SUPERMASK,)),
    Case("timm", "ConvNeXt", (COORD,)),
    Case("timm", "ConvNeXt", (MASKED,), quick=True),
    Case("timm", "ViT", (MASKED, COMPRESS)),
    Case("timm", "EfficientNet", (COORD,), quick=True),
    Case("timm", "EfficientNet", (MASKED,)),
    Case("torchvision", "ResNet", (COORD,), quick=True),
    Case("torchvision", "ResNet", (MASKED,)),
    Case("torchvision", "ViT", (MASKED, COMPRESS), where="encoder.layers.*.mlp.*"),
)


# ---- what is done to each ------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Row:
    """What the table says of a case. The fields of MEASURED depend on the machine."""

    model: str
    swapped: str
    layers: str
    at_first: str
    compiled: str = ""
    exported: str = ""
    trained: str = ""
    loaded: str = ""
    pretrained: str = ""
    undone: str = ""
    changed: str = ""
    compiler: str = ""
    exporter: str = ""
    versions: str = ""


MEASURED = ("changed", "compiler", "exporter", "versions")
HEADINGS = {
    "model": "model",
    "swapped": "swapped",
    "layers": "layers",
    "at_first": "output at first",
    "compiled": "compiled",
    "exported": "exported",
    "trained": "trained",
    "loaded": "saved, loaded",
    "pretrained": "`from_pretrained`",
    "undone": "undone",
    "changed": "swap changed by",
    "compiler": "compiled, apart by",
    "exporter": "exported, apart by",
    "versions": "with",
}


def examine(case: Case, backend: str) -> Row:
    """Does all of it, and raises AssertionError where something is not as it must be."""
    x = sized(case.model)
    model = case.build()
    original = copy.deepcopy(model)
    modules, keys, baseline = [*model.modules()], list(model.state_dict()), outputs(model, x)
    parameters = [*model.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=0.01)
    size = largest(baseline)

    def is_as_before() -> None:
        assert all(a is b for a, b in zip(model.modules(), modules, strict=True)), "undo gave other modules"
        assert list(model.state_dict()) == keys, "undo gave another state_dict"
        assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True)), "undo gave other Parameters"

    # Swapped, run, undone, and swapped again.
    reports = case.swap(model, x)
    row = Row(f"{case.library} {case.model}", case.written, _layers(reports), _at_first(case, reports, size))
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", case.library)]
    row.versions = ", ".join(versions)
    row.changed = _number(max(c.max_difference for report in reports for c in report.certificate.values()))
    swapped = outputs(model, x)
    expected = reference(original, model, case)
    assert_close(swapped, outputs(expected, x), "the model in plain torch")
    if case.swaps[0] in {COORD, RADIUS}:
        assert all(map(torch.equal, swapped, baseline)), "the output has changed"
    undo(reports)
    is_as_before()
    assert all(map(torch.equal, outputs(model, x), baseline)), "the output after undo differs"
    torch.manual_seed(0)
    reports = case.swap(model)
    if SUPERMASK in case.swaps:  # scores are drawn anew
        expected = reference(original, model, case)
        swapped = outputs(model, x)
    assert all(map(torch.equal, outputs(model, x), swapped)), "swapped again it computes something else"

    row.compiled, apart = _compiled(model, original, x, backend)
    row.compiler = _number(apart)
    row.exporter = _number(_exported(model, x))
    row.exported = "yes"
    row.trained = _trained(case, model, expected, x, optimizer, reports)
    row.loaded = _loaded(case, model, x)
    row.pretrained = _pretrained(case, model, x) if case.library == "transformers" else "–"
    undo(reports)
    is_as_before()
    row.undone = "yes"
    return row


def undo(reports: list[ff.SwapReport]) -> None:
    for report in reversed(reports):
        report.undo()


def _layers(reports: list[ff.SwapReport]) -> str:
    """Of what types, as the reports say; where a layer is swapped twice, what the last one makes of it."""
    lines = [line.split("  ")[1:] for report in reports for line in str(report).splitlines()]
    assert not any(report.left for report in reports)
    kinds = Counter(next(part.strip() for part in line if "->" in part) for line in lines)
    return ", ".join(f"{n} {kind.replace('->', '→')}" for kind, n in kinds.items())


def _at_first(case: Case, reports: list[ff.SwapReport], size: float) -> str:
    for recipe, report in zip(case.swaps, reports, strict=True):
        assert set(report.certificate) == set(report.names), "the example did not run every layer"
        if recipe in {COORD, RADIUS}:
            assert report.model_difference == 0
            assert all(c.max_difference == 0 and c.cka > 1 - 1e-9 for c in report.certificate.values())
        elif recipe == COMPRESS:
            assert report.model_difference is not None and report.model_difference <= CLOSE * size
        else:
            assert report.model_difference is not None and report.model_difference > 1e-3 * size
    return "the same bits" if case.swaps[0] in {COORD, RADIUS} else "as without the masked weights"


# ---- steps ---------------------------------------------------------------------------------------------------------------


def _compiled(model: nn.Module, original: nn.Module, x: Tensor, backend: str) -> tuple[str, float]:
    """In training mode; in eval mode if even the original does not compile in training mode, for the same reason."""
    try:
        return "yes", _compiled_in(True, model, x, backend)
    except Exception as error:
        reason = _reason(error)
        try:
            _compiled_in(True, copy.deepcopy(original), x, backend)
        except Exception as of_original:
            if _reason(of_original) == reason and not isinstance(error, AssertionError):
                return f"in eval mode; in training nor is the original: {reason}", _compiled_in(False, model, x, backend)
        raise


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _compiled_in(training: bool, model: nn.Module, x: Tensor, backend: str) -> float:
    """Outputs and gradients; the difference relative to the largest of each."""
    model.train(training)
    torch._dynamo.reset()
    try:
        eager = outputs_and_gradients(model, model, x)
        compiled = outputs_and_gradients(torch.compile(model, fullgraph=True, backend=backend), model, x)
    finally:
        torch._dynamo.reset()
        model.eval()
    return max(assert_close(a, b, "the compiled model") for a, b in zip(compiled, eager, strict=True))


def _exported(model: nn.Module, x: Tensor) -> float:
    program = torch.export.export(model, (x,))
    return assert_close(floats(program.module()(x)), outputs(model, x), "the exported program")


def _trained(
    case: Case, model: nn.Module, expected: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer, reports: list[ff.SwapReport]
) -> str:
    """One step with the optimizer of before; gradients must be those of the model in plain torch."""
    for report in reports:
        optimizer.add_param_group({"params": report.new_parameters})
    with coord_gradients(expected, model) as of_coords:
        for each in (model, expected):
            each.train()
            each.zero_grad(set_to_none=True)
            loss = loss_of(floats(each(x)))
            loss.backward()
            assert loss.isfinite()
    compared = _check_gradients(case, model, expected, of_coords)

    moving = {n: p.detach().clone() for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    still = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer.step()
    now = dict(model.named_parameters())
    assert moving and not any(torch.equal(now[name], before) for name, before in moving.items()), "a parameter did not move"
    assert all(torch.equal(now[name], before) for name, before in still.items()), "a frozen parameter moved"
    model.eval()
    kept = masks(case, model)
    if kept:
        _check_plain(case, model, kept, x)
    return f"yes, {compared} gradients"


def _check_gradients(case: Case, model: nn.Module, expected: nn.Module, of_coords: Mapping[str, Tensor]) -> int:
    theirs = {name: p.grad for name, p in expected.named_parameters()} | dict(of_coords)
    size = largest([grad for grad in theirs.values() if grad is not None])
    kept = masks(case, model)
    compared = Counter[str]()
    for name, p in model.named_parameters():
        layer, _, kind = name.rpartition(".")
        if not p.requires_grad:
            assert p.grad is None, f"{name} is frozen"
            continue
        expect = theirs[f"{layer}.weight" if kind == "scores" else name]
        if expect is None:
            assert p.grad is None or not p.grad.any(), f"{name} has a gradient, and has none in the original"
            continue
        assert p.grad is not None, f"{name} has no gradient"
        if kind == "scores":
            expect = expect * model.get_submodule(layer).weight * p.detach().sign()
        elif kind == "weight" and layer in kept:
            expect = expect * kept[layer]
            assert not p.grad[~kept[layer]].any(), f"{name} has a gradient where it is masked"
        apart = (p.grad - expect).abs().max().item()
        assert apart <= CLOSE * size, f"gradient of {name}: {apart:.3g} from that of the model in plain torch, of {size:.3g}"
        compared[kind] += 1
    assert compared["bias"] > 1
    if not {MASKED, COMPRESS} & set(case.swaps):
        assert compared["coord_weight"] or compared["scores"]
    return compared.total()


def _check_plain(case: Case, model: nn.Module, kept: Mapping[str, Tensor], x: Tensor) -> None:
    """Masked weights are zero after training, and back in plain layers the model computes the same."""
    trained = outputs(model, x)
    assert not all(map(torch.equal, trained, outputs(case.build(), x)))
    # Plain layers have weights of their own: those that are tied stay masked.
    times = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    free = {name for name in kept if all(times[id(p)] == 1 for p in model.get_submodule(name).parameters())}
    report = ff.swap(model, ff.recipes.plain(), where=lambda name, _layer: name in free)
    assert set(report.names) == free
    for name in free:
        layer, mask = model.get_submodule(name), kept[name]
        assert type(layer) in {nn.Linear, nn.Conv2d}
        weight: Any = layer.weight
        assert not weight[~mask].any() and weight[mask].all(), f"weights of {name}"
    assert_close(outputs(model, x), trained, "the model of plain layers")
    report.undo()


def _loaded(case: Case, model: nn.Module, x: Tensor) -> str:
    """A state_dict on disk, into another model that was swapped alike."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = case.build(seed=1)
    case.swap(other)
    assert not torch.equal(outputs(other, x)[0], outputs(model, x)[0])
    other.load_state_dict(torch.load(file, weights_only=True))
    assert all(map(torch.equal, outputs(other, x), outputs(model, x))), "loaded it computes something else"
    return "yes"


def _pretrained(case: Case, model: Any, x: Tensor) -> str:
    """transformers' own files, into a class whose models are swapped when they are built: on the meta device."""
    if COMPRESS in case.swaps:  # needs the values
        masked = dataclasses.replace(case, swaps=(MASKED,))
        fresh = case.build()
        masked.swap(fresh)
        other = _from_pretrained(masked, fresh)
        if other is None:
            return NOT_A_SUBCLASS
        ff.swap(other, RECIPES[COMPRESS], where=case.where)
        ff.swap(fresh, RECIPES[COMPRESS], where=case.where)
        assert all(map(torch.equal, outputs(other, x), outputs(fresh, x))), "from_pretrained it computes something else"
        return "yes, then compressed"
    other = _from_pretrained(case, model)
    if other is None:
        return NOT_A_SUBCLASS
    assert all(map(torch.equal, outputs(other, x), outputs(model, x))), "from_pretrained it computes something else"
    return "yes"


NOT_A_SUBCLASS = "nor is a subclass of the original"


def _from_pretrained(case: Case, model: Any) -> nn.Module | None:
    """None where not even the original comes back as a subclass, for the same entries."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        other, found = swapping_class(case, type(model)).from_pretrained(folder, output_loading_info=True)
        wrong = {what: _of_the_original(names) for what, names in found.items() if names}
        if wrong:
            case.build().save_pretrained(folder)  # type: ignore[operator]
            subclass = type(type(model).__name__, (type(model),), {})
            _, of_original = subclass.from_pretrained(folder, output_loading_info=True)  # type: ignore[attr-defined]
            assert wrong == {what: set(names) for what, names in of_original.items() if names}
            return None
        return other.eval()


def _of_the_original(names: Any) -> set[str]:
    return {name for name in names if name.rpartition(".")[2] not in {"coord_weight", "scores", "mask_bits"}}


def swapping_class(case: Case, base: Any) -> Any:
    """A class whose models are swapped when they are built, as it is done for checkpoints of swapped models."""

    def build_and_swap(self: Any, config: Any) -> None:
        base.__init__(self, config)
        case.swap(self)

    return type(base.__name__, (base,), {"__init__": build_and_swap})


# ---- the same in plain torch ---------------------------------------------------------------------------------------------


def reference(original: nn.Module, swapped: nn.Module, case: Case) -> nn.Module:
    """A copy of the original whose weights are zero where the swapped layers' are masked; none is frozen."""
    model = copy.deepcopy(original).requires_grad_(True)
    with torch.no_grad():
        for name, mask in masks(case, swapped).items():
            weight: Any = model.get_submodule(name).weight
            weight.copy_(torch.where(mask, weight, 0))
    return model


@contextlib.contextmanager
def coord_gradients(model: nn.Module, swapped: nn.Module) -> Iterator[dict[str, Tensor]]:
    """What backward inside should give the weights of coordinates, from the model that has none."""
    found: dict[str, Tensor] = {}
    handles = []

    def watch(name: str, like: Tensor, conv: Any, args: Any, y: Tensor) -> None:
        x = args[0]
        axes = [torch.linspace(-1, 1, n) if n > 1 else torch.zeros(1) for n in x.shape[2:]]
        coords = [*torch.meshgrid(*axes, indexing="ij")]
        if like.shape[1] == 3:
            coords.append((coords[0].square() + coords[1].square()).sqrt())
        batch = torch.stack(coords).expand(len(x), -1, -1, -1)

        def add(grad: Tensor) -> None:
            of_weight = torch.nn.grad.conv2d_weight(
                batch, list(like.shape), grad, stride=conv.stride, padding=conv.padding, dilation=conv.dilation
            )
            found[name] = found.get(name, torch.zeros_like(like)) + of_weight

        if y.requires_grad:
            y.register_hook(add)

    for layer, conv in swapped.named_modules():
        if isinstance(conv, ff.nn.CoordConv2d):
            hook = functools.partial(watch, f"{layer}.coord_weight", conv.coord_weight.detach())
            handles.append(model.get_submodule(layer).register_forward_hook(hook))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def masks(case: Case, swapped: nn.Module) -> dict[str, Tensor]:
    """What each masked layer keeps, worked out from the weights as they came, or from the scores as they are."""
    original = case.build()
    found = {}
    for name, layer in swapped.named_modules():
        if isinstance(layer, MASKING):
            values: Any = layer.scores if SUPERMASK in case.swaps else original.get_submodule(name).weight
            found[name] = largest_ones(values.detach(), DENSITY)
    return found


def largest_ones(values: Tensor, density: float) -> Tensor:
    """As bool; ties to the first, and values.numel() less the whole number of those that go."""
    kept = torch.zeros(values.numel(), dtype=torch.bool)
    order = values.abs().flatten().argsort(descending=True, stable=True)
    kept[order[: values.numel() - int((1 - density) * values.numel())]] = True
    return kept.view_as(values)


# ---- comparing -----------------------------------------------------------------------------------------------------------


def floats(output: Any) -> list[Tensor]:
    """The tensors of numbers in a model's output."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    return [x for part in parts for x in floats(part)]


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    assert not model.training
    with torch.no_grad():
        found = floats(model(x))
    assert found
    return found


def loss_of(found: list[Tensor]) -> Tensor:
    return torch.stack([x.square().mean() for x in found]).sum()


def outputs_and_gradients(function: Any, model: nn.Module, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Of the Parameters that get one."""
    trained = [p for p in model.parameters() if p.requires_grad]
    found = floats(function(x))
    gradients = torch.autograd.grad(loss_of(found), trained, allow_unused=True, materialize_grads=True)
    return [y.detach() for y in found], list(gradients)


def largest(tensors: list[Tensor]) -> float:
    return max(x.abs().max().item() for x in tensors)


def assert_close(actual: list[Tensor], expected: list[Tensor], what: str) -> float:
    """The largest difference, relative to the largest value of all."""
    assert [x.shape for x in actual] == [x.shape for x in expected], what
    size = largest(expected)
    assert 0 < size < float("inf")
    apart = largest([x - y for x, y in zip(actual, expected, strict=True)]) / size
    assert apart <= CLOSE, f"{what} differs by {apart:.3g} of the largest value"
    return apart


def _number(x: float) -> str:
    return "0" if x == 0 else f"{x:.1e}"


@contextlib.contextmanager
def quiet(library: str) -> Iterator[None]:
    """Without progress bars and reports of what was loaded."""
    if library != "transformers":
        yield
        return
    logging = importlib.import_module("transformers").logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


# ---- the table -----------------------------------------------------------------------------------------------------------


def line(row: Row) -> str:
    return "| " + " | ".join(getattr(row, name) for name in HEADINGS) + " |"


def stored_rows() -> dict[tuple[str, str], Row]:
    """The rows of the page, by model and what was swapped."""
    rows = [
        [cell.strip() for cell in text.strip().strip("|").split(" | ")]
        for text in PAGE.read_text(encoding="utf-8").splitlines()
        if text.startswith("| ") and not text.startswith(("| ---", "| model "))
    ]
    return {(cells[0], cells[1]): Row(*cells) for cells in rows}


def around_the_table() -> tuple[str, str]:
    """The page before its table, and after."""
    lines = PAGE.read_text(encoding="utf-8").splitlines(keepends=True)
    table = [i for i, each in enumerate(lines) if each.startswith("|")]
    return "".join(lines[: table[0]]), "".join(lines[table[-1] + 1 :])


def write(names: list[str]) -> None:
    rows = stored_rows()
    for case in CASES:
        if names and not any(name in case.name for name in names):
            continue
        try:
            importlib.import_module(case.library)
        except (ImportError, RuntimeError) as error:
            print(f"{case.name}: keeps its row, {error}")
            continue
        with quiet(case.library):
            rows[f"{case.library} {case.model}", case.written] = examine(case, "inductor")
        print(f"{case.name}: {rows[f'{case.library} {case.model}', case.written]}", flush=True)
    before, after = around_the_table()
    heads = ["| " + " | ".join(HEADINGS.values()) + " |", "| " + " | ".join("---" for _ in HEADINGS) + " |"]
    wanted = [(f"{case.library} {case.model}", case.written) for case in CASES]
    table = heads + [line(rows[key]) for key in wanted if key in rows]
    PAGE.write_text(before + "\n".join(table) + "\n" + after, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", nargs="*", metavar="PART_OF_A_NAME", required=True)
    write(parser.parse_args().write)
