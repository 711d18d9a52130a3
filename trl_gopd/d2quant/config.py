"""Configuration of the quantizer: how to quantize, and what a checkpoint states about itself."""

import copy
import math
from collections.abc import Iterator
from typing import Any, Self

import torch
from transformers.utils.quantization_config import QuantizationConfigMixin

from .fields import check_choices, check_integer, check_number, listed
from .grids import GRIDS, Grid
from .integrity import check_settings
from .names import check_patterns, is_listed, is_named
from .packing import BITS


QUANT_METHOD = "d2quant"
# Version of the checkpoint format, configuration included. Others are refused when loading: a newer one is not known,
# and what version 1 stated of itself left the configuration out.
FORMAT_VERSION = 2
ROUNDINGS = ("rtn", "gptq", "gptaq")
ROTATIONS = (None, "full", "group")
SCALE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}

# Fields that are only needed while quantizing. They are not copied by `deepcopy`, and not written to `config.json`.
RUNTIME_FIELDS = ("dataset", "tokenizer", "work_dir", "device", "offload", "report_errors")


class D2QuantConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """
    Configuration of D²Quant, weight-only quantization below four bits: https://huggingface.co/papers/2602.02546.

    The defaults are what measured best, see `docs/d2quant.md`; [`D2QuantConfig.paper`] and [`D2QuantConfig.release`]
    are the settings of the paper and of its authors' code.

    > Parameters that control the format

    Args:
        bits (`int`, *optional*, defaults to `2`):
            Width of a code: 2, 3, 4 or 8.
        group_size (`int`, *optional*, defaults to `64`):
            Number of consecutive columns of a weight that share a scale. It need not divide the width: the last group
            may be smaller. -1 is one group for each row.
        grid (`str`, *optional*, defaults to `"affine"`):
            Codebook of a group: `"affine"` (a scale and an integer zero point), `"midrise"` (a scale; symmetric, with
            no level at zero) or `"bitplane"` (a scale for each bit, as in the authors' release; 2 or 3 bits).
        down_grid (`str`, *optional*):
            Codebook of the second linear of an MLP, which is the one that can have a column scale. By default it is
            `grid`, as for all other linears.
        scale_dtype (`str`, *optional*, defaults to `"float16"`):
            Dtype of the stored scales: `"float16"`, `"bfloat16"` or `"float32"`.
        embedding_bits (`int`, *optional*, defaults to `8`):
            Width of a code of the token embeddings and of the output head: 2, 3, 4 or 8, in affine groups of
            `group_size` channels. Tied ones share their storage. At 8 bits they are rounded to nearest; below, the
            head is rounded with GPTQ unless `rounding="rtn"`. `None` leaves both as they are.
        modules_to_not_convert (`list[str]`, *optional*):
            Linears of the decoder blocks, embedding or head to leave as they are: by the end of their names
            (`"mlp.down_proj"`), by the name of a module that contains them (`"layers.0"`, `"self_attn"`), or by a
            regular expression for the name from its start (`".*down_proj"`); or parameters with the matrices of all
            experts (`"mlp.experts.down_proj"`). An entry that nothing has is refused. Of tied ones, embedding and head
            are both left. A checkpoint lists all matrices of the blocks, and the embedding and head, that are in full
            precision.

    > Parameters that control the rounding

    Args:
        rounding (`str`, *optional*, defaults to `"gptaq"`):
            `"rtn"` (round to nearest), `"gptq"`, or `"gptaq"`, which also compensates the difference between the
            inputs in the quantized and in the full-precision model.
        alpha (`float`, *optional*, defaults to `0.25`):
            Share of the asymmetry that `"gptaq"` compensates.
        damp_percent (`float`, *optional*, defaults to `0.01`):
            Damping of the Hessian, a fraction of the mean of its diagonal.
        act_group_aware (`bool`, *optional*, defaults to `True`):
            Whether columns are visited by decreasing Hessian diagonal, group by group.
        hessian_weights (`bool`, *optional*, defaults to `True`):
            Whether codebooks are fitted with columns weighted by the Hessian's diagonal. `False` is the paper's fit.
        clip (`bool`, *optional*, defaults to `True`):
            Whether the fit of a codebook starts from the best clipped range rather than from the full one.
        iterations (`int`, *optional*, defaults to `15`):
            Alternations of that fit.

    > Parameters that control what D²Quant adds

    Args:
        column_scale (`bool`, *optional*, defaults to `False`):
            Dual-scale quantizer (DSQ): whether the second linear of an MLP gets a scale for each column, absorbed into
            the rows of the linear before it.
        mean_shift (`bool`, *optional*, defaults to `False`):
            Deviation-aware correction (DAC): whether the mean shift at the norm before the MLP is taken back, in
            biases of the linears that read it.
        shift_gate (`float`, *optional*, defaults to `0.0`):
            Channels are not corrected if the mean explains less than this share of their deviation's energy.
        shift_shrink (`bool`, *optional*, defaults to `False`):
            Whether the correction is shrunk towards 0 where the mean is uncertain.
        rotation (`str`, *optional*):
            Hadamard rotation of the residual stream, applied before quantizing: `"full"` mixes all channels, `"group"`
            mixes each run of `group_size` channels, which must divide the hidden size. Tied embeddings are untied.
        tune_epochs (`int`, *optional*, defaults to `3`):
            Number of passes over the calibration tokens in which scales, norms and biases of all blocks, and codes
            with `tune_codes`, are trained on the token distributions of the full-precision model. One window in
            sixteen is held out, at most eight, and the best state there is kept. 0 skips this refinement.
        tune_learning_rate (`float`, *optional*):
            Learning rate of the refinement, relative to the mean magnitude of each tensor. By default it is 1e-2 at 2
            bits, and 5e-3 above, where larger rates overfit the calibration text.
        tune_codes (`float`, *optional*, defaults to `0.0`):
            How far the latent value of a code moves in all steps together, if all its gradients agree, in codes. A
            code changes after half a code. 0 trains scales, norms and biases only; bit-planes always do.

    > Parameters that control calibration

    Args:
        dataset (*optional*):
            `None` (an embedded English text), `"wikitext2"`, the path of a text file, a list of strings, a `datasets`
            object or token ids. Not stored.
        tokenizer (*optional*):
            Tokenizer, or its folder or name. By default it is loaded from the model's path. Not stored.
        num_samples (`int`, *optional*, defaults to `16`):
            Number of token windows to calibrate on.
        seq_length (`int`, *optional*, defaults to `512`):
            Number of tokens in a window, BOS included.
        add_bos_token (`bool`, *optional*):
            Whether every window of text begins with the tokenizer's beginning-of-sequence token (BOS). By default it
            does if the tokenizer begins text with it when it is called: that of Gemma or Llama does, that of Qwen or
            SmolLM2 does not. Data that are token ids are used as they are.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the choice of windows, of the rotation, and of the order of windows in the refinement.
        work_dir (`str`, *optional*):
            Folder in which finished blocks are kept, so that an interrupted run can be resumed. Each run has a folder
            of its own in it, named after a checksum of the weights, the calibration tokens and the settings: runs may
            share `work_dir`, also at the same time, and none takes up the blocks of another. Blocks that are damaged
            are quantized again, with a warning. Nothing is removed at the end. Not stored.

    > Parameters that control where a run computes, and what it reports; none is stored

    Args:
        device (`str` or `torch.device`, *optional*):
            Where blocks are quantized: each comes there for its turn and goes back. By default, where they are.
        offload (`str`, *optional*):
            Where what is not in use waits: `"cpu"`, or `"disk"`: dense blocks in the checkpoint's mapped files, hidden
            states in files in `work_dir` or the temporary folder. By default, where the model is, and on the CPU.
        report_errors (`bool`, *optional*, defaults to `True`):
            Whether the report states how much each linear lost, measured on at most 256 of its rows.

    > Parameters that a checkpoint states about itself, not to be passed

    Args:
        format_version (`int`, *optional*, defaults to `2`):
            Version of the checkpoint's format.
        bias_modules (`list[str]`, *optional*):
            Linears with a bias, by the end of their names.
        input_scale_modules (`list[str]`, *optional*):
            Linears that scale their input, by the end of their names.
        down_modules (`list[str]`, *optional*):
            Linears with the codebook `down_grid`, by the end of their names.
        expert_parameters (`dict[str, bool]`, *optional*):
            Parameters with the matrices of all experts that are stored as a linear for each expert, by the end of
            their names, and whether these matrices are transposed in the parameter.
        integrity (`dict`, *optional*):
            Checksums, and what `config.json` said of the model when it was saved.

    Raises:
        `TypeError`: if a value has the wrong type.
        `ValueError`: if a value is out of range, or the checkpoint is of another version.

    Example:

    ```python
    >>> from trl_gopd import D2QuantConfig

    >>> D2QuantConfig(bits=3).group_size
    64

    ```
    """

    def __init__(
        self,
        bits: int = 2,
        group_size: int = 64,
        *,
        grid: Grid = "affine",
        down_grid: Grid | None = None,
        scale_dtype: str | torch.dtype = "float16",
        embedding_bits: int | None = 8,
        modules_to_not_convert: list[str] | None = None,
        rounding: str = "gptaq",
        alpha: float = 0.25,
        damp_percent: float = 0.01,
        act_group_aware: bool = True,
        hessian_weights: bool = True,
        clip: bool = True,
        iterations: int = 15,
        column_scale: bool = False,
        mean_shift: bool = False,
        shift_gate: float = 0.0,
        shift_shrink: bool = False,
        rotation: str | None = None,
        tune_epochs: int = 3,
        tune_learning_rate: float | None = None,
        tune_codes: float = 0.0,
        dataset: Any = None,
        tokenizer: Any = None,
        num_samples: int = 16,
        seq_length: int = 512,
        add_bos_token: bool | None = None,
        seed: int = 0,
        work_dir: str | None = None,
        device: str | torch.device | None = None,
        offload: str | None = None,
        report_errors: bool = True,
        format_version: int = FORMAT_VERSION,
        bias_modules: list[str] | None = None,
        input_scale_modules: list[str] | None = None,
        down_modules: list[str] | None = None,
        expert_parameters: dict[str, bool] | None = None,
        integrity: dict[str, Any] | None = None,
        quant_method: str = QUANT_METHOD,
    ):
        self.quant_method = quant_method
        self.bits = bits
        self.group_size = group_size
        self.grid = grid
        self.down_grid = down_grid
        # stored as a string, since JSON has no dtypes
        self.scale_dtype = str(scale_dtype).removeprefix("torch.")
        self.embedding_bits = embedding_bits
        self.modules_to_not_convert = modules_to_not_convert
        self.rounding = rounding
        self.alpha = alpha
        self.damp_percent = damp_percent
        self.act_group_aware = act_group_aware
        self.hessian_weights = hessian_weights
        self.clip = clip
        self.iterations = iterations
        self.column_scale = column_scale
        self.mean_shift = mean_shift
        self.shift_gate = shift_gate
        self.shift_shrink = shift_shrink
        self.rotation = rotation
        self.tune_epochs = tune_epochs
        self.tune_learning_rate = (1e-2 if bits == 2 else 5e-3) if tune_learning_rate is None else tune_learning_rate
        self.tune_codes = tune_codes
        self.dataset = dataset
        self.tokenizer = tokenizer
        self.num_samples = num_samples
        self.seq_length = seq_length
        self.add_bos_token = add_bos_token
        self.seed = seed
        self.work_dir = work_dir
        self.device = device
        self.offload = offload
        self.report_errors = report_errors
        self.format_version = format_version
        self.bias_modules = bias_modules
        self.input_scale_modules = input_scale_modules
        self.down_modules = down_modules
        self.expert_parameters = expert_parameters
        self.integrity = integrity
        self.post_init()

    @classmethod
    def paper(cls, bits: int = 2, **overrides: Any) -> Self:
        """
        The settings of [D²Quant](https://huggingface.co/papers/2602.02546), with the codebook the paper describes: an
        affine one with a column scale, fitted with all columns alike. It is calibrated on the training split of
        WikiText-2, from the hub.

        Args:
            bits (`int`, *optional*, defaults to `2`): Width of a code; the paper has 2 and 3.
            overrides: Other fields, instead of the paper's.
        """
        settings = {
            "bits": bits,
            "group_size": 128,
            "grid": "affine",
            "embedding_bits": None,
            "rounding": "gptaq",
            "alpha": 0.25,
            "damp_percent": 0.01,
            "act_group_aware": True,
            "hessian_weights": False,
            "clip": True,
            "iterations": 15,
            "column_scale": True,
            "mean_shift": True,
            "rotation": "group",
            "tune_epochs": 0,
            "dataset": "wikitext2",
            "num_samples": 128,
            "seq_length": 2048,
        }
        return cls(**{**settings, **overrides})

    @classmethod
    def release(cls, bits: int = 2, **overrides: Any) -> Self:
        """
        The settings of the authors' code: those of [`D2QuantConfig.paper`], with bit-planes as the codebook of the
        second linear of an MLP.

        Args:
            bits (`int`, *optional*, defaults to `2`): Width of a code, 2 or 3.
            overrides: Other fields, instead of the release's.
        """
        return cls.paper(bits, **{"down_grid": "bitplane", **overrides})

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """
        Configuration from what [`to_dict`] returned, or from a part of it.

        Raises:
            `ValueError`: if it is of another version, it has checksums that do not match, or a value is out of range.
            `TypeError`: if it has a key that is no field, or a value of the wrong type.
        """
        # Checked first: with a newer format, any other error would be misleading.
        _check_version(config_dict.get("format_version", FORMAT_VERSION))
        if config_dict.get("integrity") is not None:
            check_settings(config_dict)
            # A checkpoint that does not state it is older than the packing of embeddings.
            config_dict = {"embedding_bits": None, **config_dict}
        fields = vars(cls())
        unknown = [name for name in config_dict if name not in fields]
        if unknown:
            raise TypeError(f"`D2QuantConfig` has no {listed(unknown)}. It has {listed(fields)}.")
        return super().from_dict(config_dict, return_unused_kwargs, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The fields that are written to `config.json`: all but those that are only needed while quantizing."""
        return {name: copy.deepcopy(value) for name, value in vars(self).items() if name not in RUNTIME_FIELDS}

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()

    def __eq__(self, other: object) -> bool:
        # The inherited method compares `quant_method` only.
        return isinstance(other, D2QuantConfig) and self.to_dict() == other.to_dict()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # `from_pretrained` copies its arguments. A data set may be large, and a generator cannot be copied.
        copied = copy.copy(self)
        for name, value in vars(self).items():
            setattr(copied, name, value if name in RUNTIME_FIELDS else copy.deepcopy(value, memo))
        return copied

    def skips(self, name: str) -> bool:
        """Whether the linear called `name` in its model is left in full precision."""
        return is_named(name, self.modules_to_not_convert)

    @property
    def torch_scale_dtype(self) -> torch.dtype:
        """`scale_dtype` as a dtype of torch."""
        return SCALE_DTYPES[self.scale_dtype]

    def group_size_of(self, in_features: int) -> int:
        """Columns that share a scale in a linear with `in_features` columns."""
        return in_features if self.group_size == -1 else self.group_size

    @property
    def rotation_size(self) -> int | None:
        """Channels that `rotation` mixes; `None` for all."""
        return self.group_size if self.rotation == "group" and self.group_size != -1 else None

    def grid_of(self, name: str) -> Grid:
        """Codebook of the linear called `name` in its model, according to the `down_modules` of a checkpoint."""
        return self.down_grid if self.down_grid and is_listed(name, self.down_modules) else self.grid

    def post_init(self) -> None:
        """Checks the fields."""
        if self.quant_method != QUANT_METHOD:
            raise ValueError(
                f"`quant_method` must be '{QUANT_METHOD}', got {self.quant_method!r}. Use the class of that method."
            )
        _check_version(self.format_version)
        check_choices(self, "bits", BITS)
        if self.group_size != -1:
            check_integer(self, "group_size", 1, "-1 is one group for each row.")
        check_choices(self, "grid", GRIDS)
        check_choices(self, "down_grid", (None, *GRIDS))
        if "bitplane" in (self.grid, self.down_grid) and self.bits not in (2, 3):
            raise ValueError(
                f"`bits` must be 2 or 3 for the grid 'bitplane', got {self.bits}. Use the grid 'affine' or 'midrise'."
            )
        check_choices(self, "scale_dtype", tuple(SCALE_DTYPES))
        check_choices(self, "embedding_bits", (None, *BITS))
        check_choices(self, "rounding", ROUNDINGS)
        check_number(self, "alpha", 0, 1, "0 is GPTQ.")
        check_number(self, "damp_percent", 0, 1, "GPTQ uses 0.01.", open_start=True)
        check_integer(self, "iterations", 0, "0 keeps the clipped range it starts from.")
        check_number(self, "shift_gate", 0, 1, "0 corrects all channels.")
        check_choices(self, "rotation", ROTATIONS)
        check_integer(self, "tune_epochs", 0, "0 leaves the refinement out.")
        check_number(self, "tune_learning_rate", 0, math.inf, "Use 1e-2.", open_start=True)
        check_number(self, "tune_codes", 0, 16, "Use 1.0; 0 keeps the codes.")
        check_integer(self, "num_samples", 1, "GPTQ uses 128.")
        # A single token has nothing to predict and nothing to attend to.
        check_integer(self, "seq_length", 2, "GPTQ uses 2048.")
        if self.add_bos_token not in (None, True, False) or type(self.add_bos_token) is int:
            raise TypeError(
                f"`add_bos_token` must be None, True or False, got {self.add_bos_token!r}. None does as the tokenizer "
                "does."
            )
        check_integer(self, "seed", 0, "Use 0.")
        check_choices(self, "offload", (None, "cpu", "disk"))
        if self.offload == "disk" and self.rotation is not None:
            raise ValueError(
                f"`offload='disk'` leaves weights in files, and `rotation={self.rotation!r}` changes all of them. "
                "Use `offload='cpu'`, or `rotation=None`."
            )
        corrections = ("column_scale", "mean_shift", "shift_shrink")
        for name in ("act_group_aware", "hessian_weights", "clip", *corrections, "report_errors"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"`{name}` must be True or False, got {getattr(self, name)!r}. Pass one of the two.")
        for name in ("modules_to_not_convert", "bias_modules", "input_scale_modules", "down_modules"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, (list, tuple)) and all(type(v) is str for v in value)):
                raise TypeError(f"`{name}` must be a list of names of linears, got {value!r}. Pass ['mlp.down_proj'].")
        if not isinstance(self.expert_parameters, (dict, type(None))):
            raise TypeError(f"`expert_parameters` must be a mapping, got {self.expert_parameters!r}. Leave it out.")
        check_patterns(self.modules_to_not_convert)


def _check_version(version: Any) -> None:
    if type(version) is not int or version < 1:
        raise ValueError(f"`format_version` must be {FORMAT_VERSION}, got {version!r}. Leave it out.")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"The checkpoint is of `format_version` {version}, written by a newer trl_gopd; this one reads "
            f"{FORMAT_VERSION}. Upgrade: `pip install -U trl-gopd`."
        )
    if version < FORMAT_VERSION:
        raise ValueError(
            f"The checkpoint is of `format_version` {version}, whose checksums leave its configuration out; this "
            f"trl_gopd reads {FORMAT_VERSION}. Quantize the model again."
        )
