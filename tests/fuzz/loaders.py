"""Every loader of the project with a small valid folder of what it reads."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import autoencoders
import gguf
import numpy as np
import torch

from pysteer import convert, files
from pysteer.capture import ActivationStore, Fitted, Moments
from pysteer.capture.prompts import read_prompts
from pysteer.capture.store import PROMPTS
from pysteer.methods import LinearAcT, MeanDifference, Prototype, RowGate
from pysteer.models.infinity.config import InfinityConfig
from pysteer.models.infinity.convert import convert as convert_infinity
from pysteer.models.infinity.pipeline import InfinityPipeline, load_transformer
from pysteer.models.infinity.transformer import Infinity
from pysteer.models.load import _kind_of_folder
from pysteer.models.sae import SparseAutoencoder
from pysteer.ops.channel_moments import channel_moments
from pysteer.recipes.config import build_config, merge_values, read_values
from pysteer.recipes.prototype.config import PrototypeConfig
from pysteer.recipes.setup_file import read_setup
from pysteer.recipes.source_config import prepare, read_infinity
from pysteer.steering import SiteParameters
from pysteer.zoo.shapes.classifier import ShapeClassifier, ShapeClassifierConfig
from pysteer.zoo.shapes.tokenizer import ShapeTokenizer, ShapeTokenizerConfig


class Loader(NamedTuple):
    """What writes valid files into a folder, what reads them, and how many damaged ones the default run tries."""

    write: Callable[[Path], Any]
    read: Callable[[Path], Any]
    examples: int


def _tensors(folder: Path) -> None:
    tensors = {"a": torch.ones(2, 3), "b.c": torch.arange(4), "d": torch.ones(2, dtype=torch.bfloat16)}
    files.write_safetensors(folder / "a.safetensors", tensors, {"format": "pt"})


def _fitted(method: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        fits = [method.fit_site(torch.randn(9, 4), torch.randn(9, 4), paired=False) for _ in range(2)]
        banks = {name: torch.stack([fit.tensors[name] for fit in fits]) for name in fits[0].tensors}
        entry = SiteParameters("ffn.1", method.op, (0, 2), banks, dict(fits[0].options))
        Fitted(method, [entry], {"rows": "cond", "steps": [0, 2]}).save_pretrained(folder)

    return write


def _gate(folder: Path) -> None:
    RowGate.fit(torch.randn(9, 4), torch.randn(9, 4)).save_pretrained(folder)


def _sae(folder: Path) -> None:
    encoder = torch.randn(6, 4)
    limits = {"threshold": torch.rand(6), "latent_mean": torch.rand(6), "meta": {"reads": "delta"}}
    SparseAutoencoder(encoder, torch.zeros(6), encoder, torch.zeros(4), "jumprelu", **limits).save_pretrained(folder)


def _moments(folder: Path) -> None:
    moments = Moments()
    moments.values["ffn.1", 0] = torch.stack([part.double() for part in channel_moments(torch.randn(2, 5, 4))])
    moments.save_pretrained(folder)


def _store(folder: Path) -> None:
    files.write_json(folder / "capture.json", {"format": "pysteer-activations-1", "sites": ["a"]})
    files.write_parquet(folder / PROMPTS, {"prompt": [0, 1], "text": ["x", "y"], "seed": [0, 1], "label": ["", ""]})
    files.write_safetensors(folder / "shard-00000.safetensors", {"a/0": torch.randn(5, 4)})
    rows = {"prompt": [0, 1], "site": ["a", "a"], "step": [0, 0], "first": [0, 2], "tokens": [2, 3]}
    files.write_parquet(folder / "shard-00000.parquet", rows)


def _read_store(folder: Path) -> None:
    store = ActivationStore.open(folder)
    store.tokens("a")


def _prompts(folder: Path) -> None:
    files.write_json(folder / "p.json", [{"prompt": "a cat", "label": "cat"}, "a dog"])
    files.write_text(folder / "p.jsonl", '{"text": "a"}\n"b"\n')
    files.write_text(folder / "p.csv", "prompt,label\na,b\n")
    files.write_text(folder / "p.txt", "a\nb\n")


def _read_prompts(folder: Path) -> None:
    for name in ("p.json", "p.jsonl", "p.csv", "p.txt"):
        read_prompts(folder / name)


CONFIG = InfinityConfig(
    depth=1, dim=64, heads=1, bits=16, scales=((1, 1), (2, 2)), text_dim=8, text_maxlen=4, max_scales=3, mlp_ratio=4.0
)


def _transformer(folder: Path) -> None:
    files.write_safetensors(folder / "model.safetensors", Infinity(CONFIG).state_dict())
    files.write_json(folder / "config.json", CONFIG.to_dict())


def _official(folder: Path) -> None:
    torch.save(Infinity(replace(CONFIG, max_scales=15)).state_dict(), folder / "model.pth")


def _read_official(folder: Path) -> None:
    convert_infinity(folder / "model.pth", folder / f"out-{len(list(folder.iterdir()))}", pn="0.06M")


def _index(folder: Path) -> None:
    files.write_json(folder / "pipeline.json", {"pipeline": "InfinityPipeline", "tokenizer": "ShapeTokenizer"})


def _kind(folder: Path) -> None:
    files.write_json(folder / "config.json", {"_diffusers_version": "0.30", "model_type": "x"})


def _classifier(folder: Path) -> None:
    ShapeClassifier(ShapeClassifierConfig(widths=(4, 4), features=4)).save_pretrained(folder)


def _tokenizer(folder: Path) -> None:
    config = ShapeTokenizerConfig(4, ((1, 1), (2, 2)), (4, 4), (1, 1), (4, 4), (1, 1))
    ShapeTokenizer(config).save_pretrained(folder)


SETUP = {
    "scales": {"0": {"layers": [-1], "strength_cond": 3.0, "strength_uncond": 1.0}},
    "layers_text": [0, 1],
    "strength_text": 5.0,
}
EXPERIMENT = """DATASET: shapes_colors
STEERING_TYPE: BOTH
STEERING_LOCATION: ca
VARIANT: 0
BATCH_SIZE: 16
CFG: 4
DISTANCE: MAHALANOBIS
STEERING_MODE: BOTH
EXPERIMENT_SETUP: setup.json
CLASSIFIER_WEIGHTS:
FID: False
"""
OFFICIAL = """model_path: weights/infinity_125M_256x256.pth
vae_path: weights/infinity_vae_d16.pth
text_encoder_ckpt: weights/flan-t5-xl
model_type: infinity_layer12
vae_type: 16
pn: 0.06M
text_channels: 2048
tau: 0.5
"""


def _read_experiment(folder: Path) -> None:
    build_config(PrototypeConfig, prepare(merge_values(read_values(folder / "a.yml")), folder))


def _maps(folder: Path) -> None:
    edges = {"q_0_100": [-torch.ones(4), torch.ones(4)]}
    limits = {"quantiles_dict_src": edges, "quantiles_src": [-1e6, 1e6]}
    torch.save({"net.w1": torch.ones(1, 4), "net.b1": torch.ones(1, 4), **limits}, folder / "m.0:0.statedict")


def _units(folder: Path) -> None:
    units = {f"net.{name}.{i}": torch.ones(1) for name in ("weights", "biases") for i in range(3)}
    torch.save({"dim": 3, **units}, folder / "m.0:0.statedict")


def _gaussian(folder: Path) -> None:
    torch.save({name: torch.rand(4) for name in ("mu1", "mu2", "std1", "std2")}, folder / "m.0:0.statedict")


def _vectors(folder: Path) -> None:
    writer = gguf.GGUFWriter(folder / "v.gguf", "controlvector")
    writer.add_string("controlvector.model_hint", "llama")
    writer.add_array("controlvector.notes", ["a", "b"])
    for layer in (1, 2):
        writer.add_tensor(f"direction.{layer}", np.ones(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _dictionary(kind: str) -> Callable[[Path], Any]:
    return lambda folder: autoencoders.dictionary(folder, kind)


def _json(name: str, value: Any) -> Callable[[Path], Any]:
    return lambda folder: files.write_json(folder / name, value)


def _text(name: str, value: str) -> Callable[[Path], Any]:
    return lambda folder: files.write_text(folder / name, value)


LOADERS = {
    "safetensors": Loader(_tensors, lambda folder: files.read_safetensors(folder / "a.safetensors"), 900),
    "json": Loader(_json("a.json", {"a": [1, {"b": "c"}]}), lambda folder: files.read_json(folder / "a.json"), 300),
    "fitted maps": Loader(_fitted(LinearAcT()), Fitted.from_pretrained, 600),
    "fitted prototypes": Loader(_fitted(Prototype(clusters=2)), Fitted.from_pretrained, 600),
    "fitted vectors": Loader(_fitted(MeanDifference()), Fitted.from_pretrained, 300),
    "row gate": Loader(_gate, RowGate.from_pretrained, 500),
    "autoencoder": Loader(_sae, SparseAutoencoder.from_pretrained, 900),
    "moments": Loader(_moments, Moments.from_pretrained, 400),
    "activations": Loader(_store, _read_store, 300),
    "prompts": Loader(_prompts, _read_prompts, 400),
    "transformer": Loader(_transformer, load_transformer, 400),
    "pipeline index": Loader(_index, InfinityPipeline.from_pretrained, 200),
    "kind of model": Loader(_kind, _kind_of_folder, 200),
    "official transformer": Loader(_official, _read_official, 200),
    "classifier": Loader(_classifier, ShapeClassifier.from_pretrained, 400),
    "image tokenizer": Loader(_tokenizer, ShapeTokenizer.from_pretrained, 400),
    "setup": Loader(_json("a.json", SETUP), lambda folder: read_setup(folder / "a.json"), 700),
    "experiment": Loader(_text("a.yml", EXPERIMENT), _read_experiment, 500),
    "infinity files": Loader(_text("a.yml", OFFICIAL), lambda folder: read_infinity(folder / "a.yml"), 400),
    "ml-act linear": Loader(_maps, lambda folder: convert.load_ml_act(folder, "linear_ot"), 500),
    "ml-act gaussian": Loader(_gaussian, lambda folder: convert.load_ml_act(folder, "gaussian_ot"), 300),
    "lineas": Loader(_units, lambda folder: convert.load_ml_act(folder, "lineas"), 300),
    "control vector": Loader(_vectors, lambda folder: convert.load_control_vector(folder / "v.gguf"), 500),
    "sparsify": Loader(autoencoders.sparsify, convert.load_sparsify, 400),
    "saelens": Loader(lambda folder: autoencoders.saelens(folder, "gated"), convert.load_saelens, 400),
    "dictionary": Loader(_dictionary("AutoEncoder"), convert.load_dictionary, 400),
    "matryoshka dictionary": Loader(_dictionary("MatryoshkaBatchTopKSAE"), convert.load_dictionary, 300),
    "unbox": Loader(autoencoders.unbox, convert.load_unbox, 400),
}
