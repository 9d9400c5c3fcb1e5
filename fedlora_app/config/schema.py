"""The experiment's configuration: its sections, their types and their defaults.

A default stands here and nowhere else; ``conf/default.yaml`` spells all of them out.
``config_file`` reads it from YAML and reports what is wrong.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from fedlora_app.config.private import NEEDED, PRIVATE, explain_bare, is_bare
from fedlora_app.foundation.errors import UserError

GLOBAL = "global"
LOCAL = "local"
OWN_GLOBAL = "own-global"
"""The role of a global adapter that a client has for itself, under rules that leave it one."""
FEEDBACK = "feedback"
"""What a client keeps of the rounding of its updates, as messages and manifest call it."""
SAFE_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
LARGEST_INTEGER = 2**31 - 1
"""Above it numbers fit neither into a message nor into a tensor's size."""

Mode = Literal["dual", "fedavg", "finetuned", "local-only", "centralized", "adapted"]
"""What clients train; *adapted* is no mode of a federation: ``fedlora adapt`` writes such runs."""
AVERAGING_MODES = ("dual", "fedavg", "finetuned")
"""Modes in which the server makes one global adapter of several clients' updates."""
Aggregation = Literal[
    "fedavg",
    "svd",
    "residual",
    "stack",
    "freeze-a",
    "alternate",
    "share-a",
    "share-b",
    "rank-partitioned",
    "rest-of-world",
    "median",
    "trimmed-mean",
]
ServerOptimizer = Literal["none", "momentum", "adam", "yogi", "adagrad"]


class ConfigError(UserError):
    """The configuration has faults; the message lists all of them."""


class Section(BaseModel):
    """Part of a configuration: unknown keys and wrong types are faults, nothing is coerced."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

    @field_validator("*")
    @classmethod
    def _refuse_huge_integers(cls, value: Any) -> Any:
        if isinstance(value, int) and value > LARGEST_INTEGER:
            raise ValueError(f"input should be at most {LARGEST_INTEGER}")
        return value


class ExperimentConfig(Section):
    """What the run is called and what its randomness derives from."""

    name: str = Field("fedlora", pattern=SAFE_NAME)
    seed: int = Field(42, ge=0, lt=2**31)
    track: list[Literal["tensorboard", "wandb"]] = Field(default_factory=list)
    """Where the metrics go beside the run directory; each needs the extra of its name."""


class ModelConfig(Section):
    """The frozen base model."""

    name: str = Field("Qwen/Qwen2.5-7B-Instruct", min_length=1)
    """Hub id, or a folder (absolute or relative to the project)."""
    revision: str | None = None
    quantization: Literal["auto", "4bit", "none"] = "auto"
    """auto: 4bit (NF4, double quantisation) on a GPU, none on a CPU."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Of the weights and the computation. auto: bfloat16 on a GPU, float32 on a CPU."""
    embedding_device: Literal["auto", "cpu"] = "auto"
    """Of the input embedding. auto: with the model; cpu: in host memory, which for Qwen2.5-7B
    leaves 1.1 GB more on the GPU."""
    cache_quantized: bool = True
    """Keep the quantised model on disk, so that the next start reads it and quantises nothing."""
    trust_remote_code: bool = False


MAX_FROZEN_RANK = 4096


class AdapterConfig(Section):
    """One LoRA adapter."""

    rank: int = Field(16, ge=1, le=1024)
    alpha: float = Field(32, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    first_layer: int = Field(0, ge=0)
    """Decoder layers from this one up have the adapter; 0: all of them. What the layers below make
    of an example is computed once per phase."""
    frozen_rank: int = Field(0, ge=0, le=MAX_FROZEN_RANK)
    """Of a part of the global adapter that the server makes and no client trains, beside the rank
    that learns. Left out, the aggregation rules residual and stack have the ranks of all clients'
    updates together, as far as there is room; others have none."""

    @property
    def joint(self) -> AdapterConfig:
        """This adapter as it is kept: its frozen ranks are ranks like the others."""
        rank = self.rank + self.frozen_rank
        alpha = self.alpha / self.rank * rank
        return self.model_copy(update={"rank": rank, "alpha": alpha, "frozen_rank": 0})


class AdaptersConfig(Section):
    """The two adapters of a client."""

    global_: AdapterConfig = Field(default_factory=AdapterConfig, alias="global")
    local: AdapterConfig = Field(default_factory=AdapterConfig)
    gate: Literal["none", "prompt"] = "prompt"
    """prompt: the local adapter answers beside the global one where a question is one of the
    client's own, as far as its training questions tell; elsewhere the global one answers alone."""


class TrainingConfig(Section):
    """What a client does in a round."""

    schedule: Literal["phased", "mixed", "joint"] = "phased"
    """phased: global on universal data, then local beside it; mixed: one after the other likewise,
    each on all of the client's data; joint: both at once on all of it."""
    global_epochs: int = Field(2, ge=1)
    """Passes over the client's universal data per round."""
    local_epochs: int = Field(2, ge=1)
    """Passes over the client's local data (with its replay) per round."""
    replay: float = Field(0.0, ge=0, le=1)
    """Share of the universal records that the local phase sees beside the local ones, drawn anew in
    every round."""
    max_replay_ratio: float | None = Field(None, gt=0)
    """At most so many replayed universal records per local one. null: no limit."""
    max_steps: int | None = Field(None, ge=1)
    """Optimizer steps that a phase has at most in a round. Where that is less than one pass over
    its data, each round goes on with another part of it. null: no limit."""
    learning_rate: float = Field(2.0e-4, gt=0)
    batch_size: int = Field(4, ge=1)
    gradient_accumulation_steps: int = Field(6, ge=1)
    max_seq_length: int = Field(1024, ge=8)
    """Tokens per example; what is cut off is counted and reported."""
    warmup_ratio: float = Field(0.1, ge=0, lt=1)
    """Share of an adapter's whole run during which its learning rate rises."""
    lr_scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    """Over an adapter's whole run, not restarted in every round."""
    final_learning_rate_ratio: float = Field(0.1, ge=0, le=1)
    """Where cosine and linear schedules end, relative to learning_rate."""
    optimizer: Literal["adamw", "paged_adamw_8bit"] = "adamw"
    global_weight_decay: float = Field(0.0, ge=0)
    local_kept_share: float | None = Field(None, gt=0, le=1)
    """Keeps the local adapter small, so that it spoils less of what the global one knows: the
    share of it that weight decay alone would leave over a local phase, whatever the learning rate
    and the number of steps; 1: all of it. Where it learns alone, global_weight_decay holds."""
    local_weight_decay: float | None = Field(None, ge=0)
    """The same as AdamW's weight decay, which does the more the higher the learning rate and the
    more steps there are. null, and no local_kept_share: none."""
    local_kl_weight: float = Field(0.0, ge=0)
    """Holds the pair near the global adapter alone on replayed universal records and on those of
    data.public: weight of KL(global || global + local) per answer token, in the local phase of mode
    dual."""
    local_orthogonality: float = Field(0.0, ge=0)
    """Holds the two adapters' input subspaces apart: weight of their overlap (0 to 1, mean over
    modules), in the local phase of mode dual."""
    local_mixing_weight: float | None = Field(None, gt=0, lt=1)
    """In the local phase of mode dual what the adapters add is weighed, by this for the local one
    and 1 minus this for the global one; null: both count whole. With weights at inference whose sum
    is 1 too (--combine instance, mixer)."""
    proximal_mu: float = Field(0.0, ge=0)
    """FedProx: holds the global adapter near the one that was received while it is trained. Adds
    mu / 2 times the squared distance of their weights to the loss; in modes that average."""
    max_grad_norm: float = Field(1.0, gt=0)
    gradient_checkpointing: Literal["auto", True, False] = "auto"
    """auto: on where the activations would not fit into the memory that is free."""
    packing: bool = True
    """Examples are laid end to end without padding, batch_size * max_seq_length tokens at a time.
    false: batch_size examples at a time, padded, through the model's own attention, for base models
    whose layers are not plain attention."""
    fused_adapters: Literal["auto", True, False] = "auto"
    """Adapters that answer together are computed as one of their joint rank, in the base's dtype.
    auto: wherever there is no dropout, which is where it is exact."""
    attention: Literal["sdpa", "flash_attention_2"] = "sdpa"
    """flash_attention_2 needs a GPU and the package flash-attn."""
    liger_kernels: bool = False
    """Norms, rotary embedding and activations by the package liger-kernel, on a GPU."""
    compile: bool = False
    """Decoder layers through torch.compile; the first steps then take a minute or more."""


class ClientConfig(Section):
    """One participating organisation. Its files are read on its own machine only.

    In a deployment the id is enough: system prompt and files then stand in the client's own file.
    """

    model_config = ConfigDict(
        json_schema_extra={"dependentRequired": {key: [*NEEDED] for key in PRIVATE}}
    )

    id: str = Field(pattern=SAFE_NAME)
    system_prompt: str | None = None
    local_train: str | None = Field(None, min_length=1)
    local_test: str | None = None
    local_validation: str | None = None
    """What the scale of this client's local adapter is chosen on."""
    universal_train: str | None = None
    """This client's own share; data.universal_train otherwise."""
    rank: int | None = Field(None, ge=1)
    """Of this client's global adapter, where it is lower than adapters.global.rank."""
    weight: float | None = Field(None, gt=0, le=1e6)
    """Of this client's update, with federated.weighting: given."""
    first_round: int = Field(1, ge=1)
    """The round from which on it takes part."""
    last_round: int | None = Field(None, ge=1)
    """The last round in which it takes part. null: the run's."""

    @property
    def is_bare(self) -> bool:
        """Whether its own settings are not here."""
        return is_bare(vars(self))


class FederatedConfig(Section):
    """Who takes part and how the server treats them."""

    mode: Mode = "dual"
    num_rounds: int = Field(5, ge=1)
    aggregation: Aggregation = "fedavg"
    """What the server makes of the clients' updates; each rule's equation: docs/aggregation.md."""
    svd_energy: float | None = Field(None, gt=0, le=1)
    """With aggregation svd: of each module only the largest singular values that have this share
    of the sum of all squares are kept, at most the rank. null: as many as the rank."""
    trim_share: float = Field(0.2, gt=0, lt=0.5)
    """With aggregation trimmed-mean: the share of the values left out at each end."""
    weighting: Literal["examples", "equal", "given"] = "examples"
    """How much a client's update counts: by the examples of its global phase, all alike, or as its
    weight says."""
    fraction: float = Field(1.0, gt=0, le=1)
    """Share of the clients that train the global adapter in a round, drawn anew for each by the
    seed, one at least. All clients fit their local adapters in all rounds; with training.schedule
    joint only those that are drawn, and all in the last round."""
    server_optimizer: ServerOptimizer = "none"
    """What is done with the mean update beyond adding it; its state is kept with the run."""
    server_learning_rate: float | None = Field(None, gt=0)
    """null: 1 for none and momentum, 0.001 for the others."""
    server_momentum: float = Field(0.9, ge=0, lt=1)
    """Of momentum, and beta_1 of adam and yogi."""
    server_beta_2: float = Field(0.99, ge=0, lt=1)
    """Of adam and yogi."""
    server_tau: float = Field(1e-3, gt=0)
    """What keeps adam, yogi and adagrad from dividing by nothing."""
    clients_at_once: int = Field(1, ge=0)
    """Each has a base model of its own, on a GPU of its own as far as there are enough. 0: all,
    which is what clients on machines of their own want."""
    share_gpu: bool = False
    """Train on a GPU where another run trains too, instead of refusing."""
    client_timeout_seconds: float | None = Field(None, gt=0)
    """A client that has not answered by then has failed in this round. null: no limit."""
    reconnect_seconds: float = Field(300.0, ge=0)
    """A client whose SuperNode is gone is waited for so long, once; then it has failed until it is
    back. In a simulation nodes cannot go."""
    keep_rounds: int | None = Field(None, ge=1)
    """Adapters of only so many complete rounds are kept, the newest always. null: all."""
    keep_uploads: bool = False
    """Keep every update that counted at the server, so that fedlora forget can make the global
    adapter again without one client's."""
    final: Literal["last", "best"] = "last"
    """The round whose adapters are the result. best: of the evaluated ones that which does best on
    the clients' validation questions."""
    min_clients: int | None = Field(None, ge=1)
    """Fewer answers than this stop the run. null: all clients must answer."""
    upload_dtype: Literal["float32", "bfloat16", "int8", "nf4"] = "float32"
    """Of the update that a client sends; bfloat16 halves the bytes, int8 takes a quarter and nf4 an
    eighth of them. What the rounding of int8 and nf4 loses, a client adds to its next update."""
    max_norm_ratio: float | None = Field(None, gt=1)
    """An update whose L2 norm is more than so many times the median of those of earlier rounds is
    refused, and its client has failed in this round. A client refuses a global adapter likewise
    that has changed too much, or whose weights look planted. null: no limit."""
    max_update_norm: float | None = Field(None, gt=0)
    """An update with a larger L2 norm is refused in any round, also in the first, where there is no
    median yet. A run's history has those of honest ones as update_norm. null: no limit."""
    clients: list[ClientConfig] = Field(min_length=1)

    @property
    def at_once(self) -> int:
        """Number of clients that are served at the same time."""
        return min(self.clients_at_once or len(self.clients), len(self.clients))

    @property
    def required_clients(self) -> int:
        """Number of clients without which a round does not count."""
        return self.min_clients or len(self.clients)

    @property
    def rule(self) -> Aggregation:
        """The aggregation rule that is in force; a mode without an average has the plain mean."""
        return self.aggregation if self.mode in AVERAGING_MODES else "fedavg"

    @property
    def keeps_updates(self) -> bool:
        """Whether updates stay at the server; a mode without an average has none to keep."""
        return self.keep_uploads and self.mode in AVERAGING_MODES


class PrivacyConfig(Section):
    """Differential privacy of the global adapter: whom it protects, and by how much noise."""

    unit: Literal["none", "client", "record"] = "none"
    """Whose traces are hidden. client: all that one client trained on; its whole update is clipped
    and noise is added to it or to the mean. record: one training record, by clipping every
    example's gradient and adding noise in every step (DP-SGD), which fits few clients too."""
    noise: Literal["server", "client"] = "server"
    """Who adds it with unit client. server: to the mean, where the server is trusted; client: each
    to its own update before it leaves. With unit record it is always the client."""
    clip_norm: float | None = Field(None, gt=0)
    """Largest L2 norm of a client's update, or with unit record of an example's gradient."""
    noise_multiplier: float | None = Field(None, gt=0)
    """Standard deviation of the noise over clip_norm. null, and no epsilon: clipping alone."""
    epsilon: float | None = Field(None, gt=0)
    """Instead of noise_multiplier: as much noise as keeps the whole run within it."""
    delta: float | None = Field(None, gt=0, lt=1)
    """The chance with which epsilon may fail to hold; well below one over the number of units."""
    secure_aggregation: bool = False
    """Have the server see sums of updates only. Refused: docs/privacy.md says why."""


class DataConfig(Section):
    """Files that all clients share, Alpaca JSON or JSON Lines."""

    universal_train: str | None = "data/universal_train.json"
    universal_test: str | None = "data/universal_test.json"
    conflict_test: str | None = "data/conflict.json"
    universal_validation: str | None = None
    conflict_validation: str | None = None
    conflict_clients: list[Annotated[str, Field(pattern=SAFE_NAME)]] = Field(default_factory=list)
    """Ids that conflict records may name beside those of federated.clients: of clients that take no
    part here, whose answers are among the wrong ones."""
    public: str | None = Field(None, min_length=1)
    """Records of nobody in particular, for training.local_kl_weight: the local phase of mode dual
    holds the pair near the global adapter alone on them and does not learn their answers. As many
    as the client has local records, drawn anew in every round. Other modes take as many steps."""
    skip_invalid: bool = False
    """Drop and count invalid records instead of stopping."""
    on_lint_error: Literal["stop", "warn"] = "stop"
    """What an error in the question sets does, such as a test question that is trained on."""


class EvaluationConfig(Section):
    """How the question sets are scored after every round."""

    batch_size: int = Field(32, ge=1)
    max_new_tokens: int = Field(128, ge=1)
    interval: int = Field(1, ge=0)
    """Evaluate after every so many rounds; round 0 and the last one are always evaluated. 0: not
    during the run, for one that fedlora evaluate follows."""
    sample: int = Field(0, ge=0)
    """At most so many questions of each set and client in the rounds before the last, every time
    the same ones. The last round and fedlora evaluate ask all of them. 0: no limit."""
    protocol: Literal["full", "core"] = "full"
    """What fedlora evaluate and studies ask. core: the base model, the global adapter alone and
    each client's own adapters; full: also other clients' local adapters, other system prompts and
    other scales, which takes several times as long."""
    local_scales: list[Annotated[float, Field(ge=0)]] = Field(
        default_factory=lambda: [0.25, 0.5, 0.75, 1.0, 1.25, 1.5], min_length=1
    )
    """Scales of the local adapter (lambda) tried on the validation questions."""


class Config(Section):
    """A whole experiment."""

    experiment: ExperimentConfig = Field(default_factory=ExperimentConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    adapters: AdaptersConfig = Field(default_factory=AdaptersConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    federated: FederatedConfig
    privacy: PrivacyConfig = Field(default_factory=PrivacyConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)

    def client(self, client_id: str) -> ClientConfig:
        """Return the client of that id, with its own settings.

        Raises:
            ConfigError: there is none, or its own settings are not here.
        """
        client = self.entry(client_id)
        if client.is_bare:
            raise ConfigError(explain_bare(client_id))
        return client

    def require_clients(self) -> None:
        """Raise ``ConfigError`` unless every client's own settings are here, naming the others."""
        bare = [client.id for client in self.federated.clients if client.is_bare]
        if bare:
            raise ConfigError("\n".join(map(explain_bare, bare)))

    def entry(self, client_id: str) -> ClientConfig:
        """Return the client of that id, of which no more than the id may be known here."""
        for client in self.federated.clients:
            if client.id == client_id:
                return client
        known = ", ".join(client.id for client in self.federated.clients)
        raise ConfigError(f'No client is called "{client_id}". federated.clients names: {known}.')

    def adapters_of(self, client_id: str) -> AdaptersConfig:
        """Return the adapters of one client, whose global one may have a lower rank.

        What it adds is scaled as everywhere: alpha / rank is the same.
        """
        ours, rank = self.adapters.global_, self.entry(client_id).rank
        if rank is None or rank == ours.rank:
            return self.adapters
        own = ours.model_copy(update={"rank": rank, "alpha": ours.alpha / ours.rank * rank})
        return self.adapters.model_copy(update={"global_": own})

    @property
    def client_ids(self) -> list[str]:
        """Ids in the order in which clients are served."""
        return sorted(client.id for client in self.federated.clients)

    @property
    def conflict_ids(self) -> list[str]:
        """Ids that conflict records may name."""
        return list(dict.fromkeys([*self.client_ids, *self.data.conflict_clients]))

    def dump(self) -> dict[str, Any]:
        """Return plain data that ``parse_config`` reads back to an equal object."""
        return self.model_dump(mode="json", by_alias=True)
