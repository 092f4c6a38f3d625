"""The recipe: all settings of a run in one file, validated before any work starts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError, model_validator

from eval.catalog import refuse_code
from eval.config import EvalConfig
from model.config import TIERS, MergeConfig, Section, TrainConfig, TransformerConfig
from model.constants import TILE_PX, VAE_SCALE
from model.names import closest
from model.ranks import micro_batch, rank_degrees
from model.recipe_yaml import MAX_FILE_BYTES, parse, read_recipe
from model.storage import without_login, without_logins
from tasks.curation.config import CurationConfig, SourceConfig
from tasks.encoding.config import ComponentsConfig, EncodingConfig
from tasks.publishing.config import PublishConfig

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
VAE_CHANNELS = 16  # latent channels of the released VAE
MAX_RATIO = 16  # of the sides of a bucket


class Recipe(Section):
    """The settings of a complete reproduction. Load one with `load_recipe`."""

    name: str
    source: SourceConfig
    curation: CurationConfig
    components: ComponentsConfig
    encoding: EncodingConfig
    model: TransformerConfig
    train: TrainConfig
    merge: MergeConfig
    eval: EvalConfig
    publish: PublishConfig

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        self._check_pixels_and_channels()
        self._check_capacities()
        self._check_routing()
        self._check_ranks()
        self._check_data()
        self._check_curation()
        self._check_components()
        return self

    def _check_pixels_and_channels(self) -> None:
        model, tile = self.model, VAE_SCALE * self.model.patch_size
        sizes = [(f"train.stages[{i}].image_size_px", stage.image_size_px) for i, stage in enumerate(self.train.stages)]
        for key, size in [*sizes, ("eval.image_size_px", self.eval.image_size_px)]:
            if size % tile:
                below = size // tile * tile
                near = f"{below} or {below + tile}" if below else str(tile)
                raise ValueError(
                    f"{key}={size} must be a multiple of {tile} (VAE {VAE_SCALE}x, patches of {model.patch_size}), "
                    f"such as {near}"
                )
        vae = self.components.vae if self.components.kind == "trained" else None
        channels = vae.z_dim if vae is not None else VAE_CHANNELS
        packed = channels * model.patch_size**2
        if model.in_channels != packed:
            raise ValueError(
                f"model.in_channels={model.in_channels} must be {packed}: {channels} latent channels in patches of "
                f"{model.patch_size}x{model.patch_size}"
            )
        out = (model.out_channels or model.in_channels) * model.patch_size**2
        if out != packed:
            raise ValueError(
                f"model.out_channels={model.out_channels} must be {channels}: a token's output has "
                f"patch_size^2 x out_channels values, here {out}, and must have {packed} like its input"
            )
        text = self.components.text_encoder if self.components.kind == "trained" else None
        if text is not None:
            if model.joint_attention_dim != text.hidden_size:
                raise ValueError(
                    f"model.joint_attention_dim={model.joint_attention_dim} must be "
                    f"components.text_encoder.hidden_size={text.hidden_size}"
                )
            if -self.encoding.hidden_state_index >= text.num_hidden_layers:
                raise ValueError(
                    f"encoding.hidden_state_index={self.encoding.hidden_state_index} must be above "
                    f"-components.text_encoder.num_hidden_layers={-text.num_hidden_layers}"
                )

    def _check_capacities(self) -> None:
        experts = self.model.num_experts
        for i, stage in enumerate(self.train.stages):
            try:
                stage_model = self.model.with_capacity_factors(stage.capacity_factors)
            except ValidationError as error:
                message = error.errors()[0]["msg"].removeprefix("Value error, ")
                raise ValueError(f"train.stages[{i}].capacity_factors: {message}") from error
            tokens = (stage.image_size_px // (VAE_SCALE * self.model.patch_size)) ** 2
            for layer in range(self.model.num_layers):
                factor = stage_model.capacity_factor(layer)
                if stage_model.is_moe_layer(layer) and factor * tokens / experts < 1:
                    raise ValueError(
                        f"train.stages[{i}].capacity_factors={factor} at layer {layer}: "
                        f"{factor * tokens / experts:.2f} tokens for each of {experts} experts at "
                        f"{stage.image_size_px} px ({tokens} tokens); at least {experts / tokens:g} is needed for one"
                    )

    def _check_routing(self) -> None:
        chosen = self.model.routing.kind
        if self.train.losses.load_balance and chosen != "token_choice":
            raise ValueError(
                f"train.losses.load_balance={self.train.losses.load_balance} must be 0 with "
                f"model.routing.kind={chosen!r}: only token choice can leave experts without tokens"
            )

    def _check_ranks(self) -> None:
        train = self.train
        ranks = train.nnodes * train.nproc_per_node
        world = f"{ranks} ranks (train.nnodes={train.nnodes} x train.nproc_per_node={train.nproc_per_node})"
        try:
            rank_degrees(self.model, train, ranks)
        except ValueError as error:
            raise ValueError(f"{error} (of {world})") from None
        for i, stage in enumerate(train.stages):
            if stage.batch_size % ranks:
                raise ValueError(f"train.stages[{i}].batch_size={stage.batch_size} must be a multiple of the {world}")
            if stage.batch_size % (ranks * micro_batch(stage, train, ranks)):
                raise ValueError(
                    f"train.stages[{i}].batch_size={stage.batch_size} must be a multiple of "
                    f"train.local_batch_size={train.local_batch_size} on each of the {world}"
                )
        if self.merge.last_n > train.keep_checkpoints:
            raise ValueError(
                f"merge.last_n={self.merge.last_n} must be at most train.keep_checkpoints={train.keep_checkpoints}"
            )

    def _check_data(self) -> None:
        for i, stage in enumerate(self.train.stages):
            _check_ratios(f"train.stages[{i}].aspect_ratios", stage.aspect_ratios)
            _check_tiers(f"train.stages[{i}].tier_weights", stage.tier_weights)
            if not sum(stage.tier_weights.values()) > 0:
                raise ValueError(f"train.stages[{i}].tier_weights draws nothing: give a tier a weight above 0")
            known = [*(episode.name for episode in self.curation.buckets), "rest"]
            for name in stage.bucket_weights:
                if name not in known:
                    raise ValueError(
                        f"train.stages[{i}].bucket_weights has the episode {name!r}; curation.buckets are {', '.join(known)}"
                    )
        _check_tiers("curation.captions.per_tier", self.curation.captions.per_tier)

    def _check_curation(self) -> None:
        """Checks settings with which curation would fail, or reject all records, only after the records exist."""
        from tasks.curation.checks import check_curation
        from tasks.curation.scoring.decoding import DECODABLE, RGB_MODES
        from tasks.curation.sources.made.registry import check_made

        check_made(self.source)
        for key, names, valid in (
            ("formats", self.curation.filters.formats, DECODABLE),
            ("modes", self.curation.filters.modes, RGB_MODES),
        ):
            for name in names or ("",):
                if name not in valid:
                    raise ValueError(f"curation.filters.{key} has {name!r}; valid are {', '.join(valid)}")
        check_curation(self.curation)

    def _check_components(self) -> None:
        """Checks settings with which training of the small components would fail only after curation."""
        vae, text = self.components.vae, self.components.text_encoder
        if self.components.kind != "trained" or vae is None or text is None:
            return
        from tasks.encoding.small.tokenizer import SPECIAL_TOKENS

        if vae.image_size_px % TILE_PX:
            raise ValueError(f"components.vae.image_size_px={vae.image_size_px} must be a multiple of {TILE_PX}")
        _check_ratios("components.vae.aspect_ratios", vae.aspect_ratios)
        needed = len({*SPECIAL_TOKENS, *text.words})
        if text.vocab_size < needed:
            raise ValueError(
                f"components.text_encoder.vocab_size={text.vocab_size} must be at least {needed}: special tokens and "
                "components.text_encoder.words"
            )


def _check_ratios(key: str, ratios: Iterable[str]) -> None:
    for ratio in ratios or ("",):
        if not re.fullmatch(r"[1-9]\d{0,8}:[1-9]\d{0,8}", ratio):
            raise ValueError(f"{key} has {ratio!r}; write width:height, such as 16:9")
        sides = [int(side) for side in ratio.split(":")]
        if max(sides) > MAX_RATIO * min(sides):
            raise ValueError(f"{key} has {ratio!r}; one side may be {MAX_RATIO} times as long as the other at most")


def _check_tiers(key: str, tiers: Iterable[str]) -> None:
    for tier in tiers:
        if tier not in TIERS:
            raise ValueError(f"{key} has the tier {tier!r}; tiers are {', '.join(TIERS)}")


def load_recipe(name_or_path: str, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Loads recipes/NAME.yaml, a path, or a text of `recipe_text`, applies overrides such as `train.stages[0].steps=200`,
    and validates the result.

    The file may be an overlay on another recipe (`model.recipe_yaml.read_recipe`), such as `ablations/token_choice`.

    Raises:
        ValueError: a wrong key or value; the message names the key, the value and valid values, without logins and queries
            of URIs.
    """
    try:
        return _load(name_or_path, overrides)
    except ValueError as error:
        raise ValueError(without_logins(str(error))) from None


def _load(name_or_path: str, overrides: Iterable[str]) -> Recipe:
    name, data = _read(name_or_path)
    refuse_code(data.get("eval"), f"recipe {name}")
    for override in overrides:
        _apply(data, override)
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise ValueError(f"recipe {name} is not valid: {_explain(error)}") from None
    _check_size("", recipe.model_dump())
    _check_types("", data, recipe.model_dump())
    return recipe


def _read(name_or_path: str) -> tuple[str, dict[str, Any]]:
    """(name for messages, mapping) of a recipe."""
    if name_or_path.startswith("{"):
        if len(name_or_path) > MAX_FILE_BYTES:
            raise ValueError(f"a recipe's text has more than {MAX_FILE_BYTES:,} characters")
        data = parse(name_or_path, "the recipe's text")
        return str(data.get("name", "without a name")), data
    known = sorted(path.relative_to(RECIPES).with_suffix("").as_posix() for path in RECIPES.rglob("*.yaml"))
    path = RECIPES / f"{name_or_path}.yaml"
    if name_or_path not in known:
        path = Path(name_or_path)
        if not path.is_file():
            raise ValueError(
                f"recipe {str(name_or_path)!r} is neither one of {', '.join(known)} nor a file"
                f"{_did_you_mean(str(name_or_path), known)}"
            )
    return path.name, read_recipe(path)


def recipe_text(path: str) -> str:
    """A recipe file as one text, with its bases merged, for `load_recipe` on a machine without the file.

    Raises:
        ValueError: no such file, or as `load_recipe`.
    """
    if not Path(path).is_file():
        raise ValueError(f"recipe {without_login(path)!r} is not a file")
    load_recipe(path)
    return json.dumps(read_recipe(path))


def _check_types(key: str, given: Any, value: Any) -> None:
    """Refuses values that Pydantic silently converts to a number: true to 1, and for a seed 1.0 to 1."""
    if isinstance(given, dict) and isinstance(value, dict):
        for name, item in given.items():
            _check_types(f"{key}.{name}" if key else str(name), item, value.get(name))
    elif isinstance(given, list) and isinstance(value, list | tuple):
        for index, (item, number) in enumerate(zip(given, value, strict=False)):
            _check_types(f"{key}[{index}]", item, number)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        is_seed = re.search(r"(^|\.)seeds?(\[\d+\])?$", key) is not None
        if isinstance(given, bool | str) or (is_seed and not isinstance(given, int)):
            shown = str(given).lower() if isinstance(given, bool) else repr(given)
            raise ValueError(
                f"{key}={shown} must be a {'whole ' if isinstance(value, int) else ''}number, such as {value}"
            )


def _check_size(key: str, value: Any) -> None:
    """Tasks exchange whole numbers as int64 and as JSON's float64: beyond 2**53 they overflow or change."""
    if isinstance(value, int) and abs(value) > MAX_INTEGER:
        raise ValueError(f"{key}={value} is too large; whole numbers may be up to {MAX_INTEGER}")
    if isinstance(value, dict):
        for name, item in value.items():
            _check_size(f"{key}.{name}" if key else str(name), item)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check_size(f"{key}[{index}]", item)


MAX_INTEGER = 2**53
_KEY = re.compile(r"[A-Za-z_]\w*(\[\d+\])*(\.[A-Za-z_]\w*(\[\d+\])*)*")


def _apply(data: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    key = key.strip()
    if not separator or not _KEY.fullmatch(key):
        raise ValueError(f"override {override!r} must look like train.stages[0].steps=200")
    steps = [int(part) if part.isdigit() else part for part in re.findall(r"[A-Za-z_]\w*|(?<=\[)\d+(?=\])", key)]
    value = parse(text, f"override {override!r}")
    here: Any = data
    section: Any = Recipe
    for i, step in enumerate(steps):
        above = _join(steps[:i]) or "the recipe"
        if isinstance(step, int):
            if not isinstance(here, list):
                raise ValueError(f"override {override!r}: {above} is not a list")
            if step >= len(here):
                raise ValueError(
                    f"override {override!r}: index [{step}] is out of range, {above} has {len(here)} entries "
                    f"([0] to [{len(here) - 1}])"
                    if here
                    else f"override {override!r}: index [{step}] is out of range, {above} is empty"
                )
        else:
            if not isinstance(here, dict):
                raise ValueError(f"override {override!r}: {above} has no keys")
            if section is not None:
                valid = list(section.model_fields)
                if step not in valid:
                    raise ValueError(f"override {override!r}: {_unknown(_join(steps[: i + 1]), step, valid)}")
                section = _section_class(section.model_fields[step].annotation)
        if i == len(steps) - 1:
            here[step] = value
        elif isinstance(step, str) and here.get(step) is None:
            here[step] = here = {}  # a section that is not in the file
        else:
            here = here[step]


def _join(steps: Iterable[str | int]) -> str:
    key = ""
    for step in steps:
        key += f"[{step}]" if isinstance(step, int) else f".{step}" if key else step
    return key


def _did_you_mean(word: str, valid: Iterable[str]) -> str:
    near = closest(word, valid)
    return f"; did you mean {near!r}?" if near else ""


def _unknown(key: str, name: str, valid: Iterable[str]) -> str:
    return f"{key}: unknown key{_did_you_mean(name, valid)} (valid: {', '.join(sorted(valid))})"


def _explain(error: ValidationError) -> str:
    """One line with each wrong key, its value and valid values."""
    wrong: dict[str, list[str]] = {}
    got: dict[str, str] = {}
    for item in error.errors():
        location, section = _locate(item["loc"])
        key = _join(location)
        if item["type"] == "extra_forbidden":
            valid = list(section.model_fields) if section else []
            wrong.setdefault("", []).append(_unknown(key, str(item["loc"][-1]), valid))
            continue
        value = without_login(repr(item["input"]))
        if location and item["type"] != "missing" and not isinstance(item["input"], (dict, BaseModel)):
            got[key] = f" (got {value if len(value) < 80 else value[:77] + '...'})"
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "literal_error":  # "... should be 'muon' or 'adamw'"
            message += _did_you_mean(str(item["input"]), re.findall("'([^']*)'", item["ctx"]["expected"]))
        messages = wrong.setdefault(key, [])
        if message not in messages:
            messages.append(message)
    return "; ".join(
        text
        for key, messages in wrong.items()
        for text in (messages if not key else [f"{key}: {' or '.join(messages)}{got.get(key, '')}"])
    )


def _locate(location: tuple[str | int, ...]) -> tuple[list[str | int], Any]:
    """Converts Pydantic's location to (the user's key, the section class that contains the last step).

    Pydantic's location also names the member of a union that it tried ("capacity_factors.float"), which is not a key.
    """
    section: Any = Recipe
    key: list[str | int] = []
    enclosing = section
    for step in location:
        if isinstance(step, int):
            key.append(step)
            continue
        if section is None:
            if not re.search(r"\[|^(float|int|str|bool|none|tuple|dict|function-.*)$", step):
                key.append(step)  # a key of a plain mapping, such as a tier
            continue
        key.append(step)
        enclosing = section
        field = section.model_fields.get(step)
        section = _section_class(field.annotation) if field else None
    return key, enclosing


def _section_class(annotation: Any) -> type[BaseModel] | None:
    """The section class in an annotation such as `SectionA | None` or `tuple[SectionB, ...]`, or None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        section = _section_class(argument)
        if section is not None:
            return section
    return None
