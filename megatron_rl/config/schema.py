"""The typed schema of a run's configuration: one dataclass per owner, a docstring under every field.

A field's type and default are declared here and nowhere else; what a combination of fields may not be is said in
`validate.py`. Megatron's arguments keep Megatron's names. Batch sizes say what they count.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING


class Recipe(Enum):
    """What kind of training a run is."""

    rl = "rl"
    sft = "sft"
    preference = "preference"
    reward_model = "reward_model"


class Aggregation(Enum):
    """How per-token losses become one number; see `algorithms/aggregation.py`."""

    token_mean = "token_mean"
    sequence_mean_token_mean = "sequence_mean_token_mean"
    sequence_mean_token_sum = "sequence_mean_token_sum"
    token_sum_norm = "token_sum_norm"


class KLEstimator(Enum):
    """Estimators of KL(policy || reference) from samples of the policy, or the exact one; see `algorithms/kl.py`."""

    k1 = "k1"
    k2 = "k2"
    k3 = "k3"
    exact = "exact"


class Divergence(Enum):
    """Of two distributions over the vocabulary; see `algorithms/distillation_loss.py`."""

    reverse = "reverse"
    forward = "forward"
    jensen_shannon = "jensen_shannon"


class KLPlace(Enum):
    """Where the KL penalty enters: added to the loss, or subtracted from the reward."""

    loss = "loss"
    reward = "reward"


class KLReference(Enum):
    """The policy that the KL penalty holds on to."""

    fixed = "fixed"
    refreshed = "refreshed"
    moving_average = "moving_average"


class Whitening(Enum):
    """Advantages in units of their standard deviation over the tokens of the global batch; see `advantages.whiten`."""

    none = "none"
    scale = "scale"
    full = "full"


class CorrectionLevel(Enum):
    """What the ratio of training to rollout policy is taken over; see `algorithms/importance.py`."""

    token = "token"
    sequence = "sequence"
    geometric = "geometric"


class CorrectionMethod(Enum):
    """What is done with the ratio of training to rollout policy; see `algorithms/importance.py`."""

    metrics_only = "metrics_only"
    truncate = "truncate"
    mask = "mask"
    reject = "reject"


class RewardScale(Enum):
    """What becomes of the numbers that a reward model gives."""

    score = "score"
    probability = "probability"
    log_probability = "log_probability"


class RewardEngine(Enum):
    """What computes a learned reward: the training ranks, or a vLLM server."""

    megatron = "megatron"
    vllm = "vllm"


class RewardModelKind(Enum):
    """What a reward model scores: whole completions, or their steps."""

    outcome = "outcome"
    process = "process"


class LRDecayStyle(Enum):
    """Shape of the learning rate after warm-up."""

    constant = "constant"
    linear = "linear"
    cosine = "cosine"
    exponential = "exponential"


class WeightDecayStyle(Enum):
    """Shape of the weight decay's way to its end."""

    linear = "linear"
    cosine = "cosine"


class Dtype(Enum):
    """Dtype of the model's parameters and activations."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class LayerSpec(Enum):
    """Implementation of the transformer layer."""

    auto = "auto"
    portable = "portable"
    transformer_engine = "transformer_engine"


class Fp8Format(Enum):
    """Number formats of FP8 training: E4M3 everywhere, or E4M3 forward and E5M2, of wider range, for gradients."""

    e4m3 = "e4m3"
    hybrid = "hybrid"


class Fp8Recipe(Enum):
    """How FP8 training scales its tensors; see Transformer Engine's recipes."""

    delayed = "delayed"
    tensorwise = "tensorwise"
    blockwise = "blockwise"
    mxfp8 = "mxfp8"


class QuantizedFormat(Enum):
    """Formats of quantised weights; see `weights/quantization.py`."""

    fp8 = "fp8"
    fp8_block = "fp8_block"
    int8 = "int8"
    int4 = "int4"
    nvfp4 = "nvfp4"


class EnginePlacement(Enum):
    """Where the engines run: inside the training ranks, or in processes of their own."""

    colocated = "colocated"
    disaggregated = "disaggregated"


class InFlight(Enum):
    """What becomes of requests that run while weights change: see `rollout/remote.py`."""

    keep = "keep"
    wait = "wait"
    abort = "abort"


class SyncVerify(Enum):
    """How much of every weight synchronisation is proven; see `trainer/sync.py`."""

    off = "off"
    sample = "sample"
    full = "full"


class SyncTransport(Enum):
    """The way of weights to engines in processes of their own."""

    auto = "auto"
    folder = "folder"
    network = "network"
    process_group = "process_group"


class AdamImplementation(Enum):
    """Whose Adam steps the parameters."""

    auto = "auto"
    transformer_engine = "transformer_engine"
    apex = "apex"
    torch = "torch"


class NonFinite(Enum):
    """What to do when the loss or the gradient norm is not finite."""

    stop = "stop"
    skip = "skip"
    rollback = "rollback"


class GuardAction(Enum):
    """What a guard does: leave the update out, end the run, or go back to its last checkpoint."""

    skip = "skip"
    stop = "stop"
    rollback = "rollback"


@dataclass
class ModelConfig:
    """The policy."""

    hf_path: str = MISSING
    """Folder of a Hugging Face checkpoint: config.json, *.safetensors, tokenizer files."""
    load_weights: bool = True
    """False starts from random weights, drawn from `seed`; only config.json and the tokenizer are read."""
    params_dtype: Dtype = Dtype.bfloat16
    """Dtype of parameters and activations; log-probs, losses and the optimizer's state are float32 always."""
    layer_spec: LayerSpec = LayerSpec.auto
    """auto takes Transformer Engine where it is installed and a GPU is present, else the portable layers."""
    moe_routing_replay: bool = False
    """Send the tokens of an update to the experts that the pass over the old policy chose, of use where a rollout is
    trained on by more than one update; or with rollout.record_routes to those that the engine chose. Only for models
    with experts."""
    recompute_granularity: str | None = None
    """Activation recomputation: null, 'selective' (core attention) or 'full' (whole layers)."""
    recompute_method: str | None = None
    """With 'full': 'uniform' or 'block'."""
    recompute_num_layers: int | None = None
    """With 'full': layers per recomputed unit ('uniform'), or recomputed layers per stage ('block')."""
    fp8: Fp8Format | None = None
    """Train in FP8 with Transformer Engine's layers on a GPU: e4m3 or hybrid. null: in params_dtype."""
    fp8_recipe: Fp8Recipe | None = None
    """With fp8: delayed, tensorwise, blockwise (Hopper) or mxfp8 (Blackwell). null: tensorwise."""
    fp8_param: bool = False
    """With fp8: keep the weights in FP8 too, and gather them so; the optimizer's own copy is float32 as ever."""
    first_last_layers_bf16: bool = False
    """With fp8: the first and the last layers compute in bfloat16."""
    num_layers_at_start_in_bf16: int = 1
    """How many first layers first_last_layers_bf16 means."""
    num_layers_at_end_in_bf16: int = 1
    """How many last layers first_last_layers_bf16 means."""
    batch_invariant_mode: bool = False
    """Kernels whose result does not depend on the batch, in training and in engines, on a GPU: slower, and rollout and
    training log-probs agree as far as the two libraries allow."""
    quantization: QuantizedFormat | None = None
    """fp8 or int8: fake-quantise the layers in training and in log-probs, so that the policy computes as engines with
    the same rollout.quantization do (quantisation-aware training). Runs on any device."""
    transformer_config: dict[str, Any] = field(default_factory=dict)
    """Any further field of Megatron's TransformerConfig, by its own name. Overrides what the checkpoint says."""


@dataclass
class ParallelConfig:
    """How the training ranks share the model and the batch."""

    tensor_model_parallel_size: int = 1
    """Ranks that split every layer's matrices."""
    pipeline_model_parallel_size: int = 1
    """Ranks that split the layers."""
    virtual_pipeline_model_parallel_size: int | None = None
    """Chunks of layers that each pipeline stage holds, taken in turn: a smaller bubble for more messages. null: one."""
    num_layers_in_first_pipeline_stage: int | None = None
    """Layers of the first stage, where it also holds the embedding; null: as many as the others."""
    num_layers_in_last_pipeline_stage: int | None = None
    """Layers of the last stage, where it also holds the output layer; null: as many as the others."""
    account_for_embedding_in_pipeline_split: bool = False
    """Count the embedding as a layer when the layers are split evenly."""
    account_for_loss_in_pipeline_split: bool = False
    """Count the output layer as a layer when the layers are split evenly."""
    context_parallel_size: int = 1
    """Ranks that split every sequence of a row, each taking an early and a late part of it (zig-zag)."""
    expert_model_parallel_size: int = 1
    """Ranks that share the experts of MoE layers; they come from the tensor, context and data ranks of a stage."""
    expert_tensor_parallel_size: int | None = None
    """Ranks that split each expert's matrices; null: tensor_model_parallel_size."""
    sequence_parallel: bool = False
    """Split norms and residuals over the tensor-parallel ranks by sequence; needs tensor_model_parallel_size > 1."""
    data_parallel_size: int | None = None
    """Replicas. null: what the started ranks leave (1 when `megatron-rl train` starts them itself)."""
    distributed_timeout_minutes: int = 10
    """Limit of any collective wait."""


@dataclass
class OptimizerConfig:
    """AdamW through Megatron's (distributed) optimizer, and its schedule."""

    lr: float = 1e-6
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    lr_decay_style: LRDecayStyle = LRDecayStyle.constant
    """Shape of the learning rate after warm-up."""
    lr_warmup_steps: int = 0
    """Optimizer steps of linear warm-up from 0."""
    lr_decay_steps: int | None = None
    """Optimizer steps until min_lr; null: the whole run."""
    weight_decay: float = 0.0
    """Decoupled weight decay; biases and norms have none."""
    end_weight_decay: float | None = None
    """Weight decay at the end of the decay; null: it stays."""
    weight_decay_incr_style: WeightDecayStyle = WeightDecayStyle.cosine
    """With end_weight_decay: how it goes there."""
    adam_beta1: float = 0.9
    """Decay of the first moment."""
    adam_beta2: float = 0.95
    """Decay of the second moment."""
    adam_eps: float = 1e-8
    """Added to the root of the second moment."""
    clip_grad: float = 1.0
    """Global gradient norm is clipped to this; 0 turns clipping off."""
    implementation: AdamImplementation = AdamImplementation.auto
    """auto takes a fused one on a GPU where it is installed: Transformer Engine's, else apex's."""
    use_distributed_optimizer: bool = True
    """Shard the optimizer's state over the data-parallel ranks."""
    on_non_finite: NonFinite = NonFinite.stop
    """When the loss or the gradient norm is not finite: stop the run, skip the update and count it, or go back to the
    last checkpoint and on with the data that follow."""


@dataclass
class DataConfig:
    """Training and evaluation data: JSONL or Parquet files."""

    train: str | None = None
    """Training file. RL: `prompt` (and `answer`). SFT: `prompt` and `response`. Preferences: `prompt`, `chosen` and
    `rejected`, or `prompt`, `response` and `label`; see `data/preferences.py`."""
    eval: str | None = None
    """Held-out file, of the same form; null: no evaluation."""
    prompt_key: str = "prompt"
    """Field with the prompt: a string, or a list of chat messages {role, content}."""
    answer_key: str = "answer"
    """Field with the reference answer that rewards see."""
    response_key: str = "response"
    """Field with the target text of SFT, or with the completion that a label or score judges."""
    chosen_key: str = "chosen"
    """Field with the better completion of a pair: text, or chat messages that end in the assistant's."""
    rejected_key: str = "rejected"
    """Field with the worse completion."""
    label_key: str = "label"
    """Field that judges a single completion: true or false, or a number; for each step of a list of steps, a list."""
    margin_key: str | None = None
    """Field with how much better the chosen completion is, for a loss with a margin."""
    format: str = "jsonl"
    """'jsonl', 'parquet', or 'gsm8k' (JSONL with `question` and `answer` ending in `#### n`)."""
    system_prompt: str | None = None
    """Prepended as a system message, if set; makes string prompts chat messages."""
    apply_chat_template: bool | None = None
    """null: the tokenizer's chat template is used for message lists and not for strings. true, false: force it."""
    prompt_template: str | None = None
    """A Python format string around string prompts, e.g. 'Question: {prompt}\\nAnswer:'."""
    max_prompt_tokens: int = 1024
    """Longer prompts are an error, named by file and line."""
    shuffle: bool = True
    """Draw the training rows in an order shuffled anew each epoch, from `seed`."""


@dataclass
class SamplingConfig:
    """How completions are sampled in training rollouts."""

    temperature: float = 1.0
    """Divides the logits. Rollout and training log-probs both use it."""
    max_response_tokens: int = 256
    """Completions are cut here, with finish reason 'length'."""
    stop: list[str] = field(default_factory=list)
    """Strings that end a completion, besides the end-of-sequence token."""


@dataclass
class RolloutConfig:
    """Generation with vLLM."""

    placement: EnginePlacement = EnginePlacement.colocated
    """Engines inside the training ranks, or vLLM servers in processes of their own: on this machine, or in the last
    tasks of a Slurm job, tensor_model_parallel_size of them for each."""
    num_engines: int = 1
    """With placement disaggregated: engines, each driven by one of the first training ranks."""
    in_flight: InFlight = InFlight.keep
    """With placement disaggregated: requests that run while weights change go on with the new ones (keep), end first
    (wait), or are ended (abort)."""

    num_prompts_per_step: int = 16
    """Prompts of one training step."""
    num_samples_per_prompt: int = 8
    """Completions of each prompt: the size of a group."""
    tensor_model_parallel_size: int = 1
    """Ranks that share one engine; the training ranks are divided into engines of this size."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How completions are sampled."""
    max_model_len: int | None = None
    """Longest prompt + completion of the engine; null: data.max_prompt_tokens + sampling.max_response_tokens."""
    max_num_seqs: int = 256
    """Sequences that an engine decodes at once."""
    kv_cache_gigabytes: float = 0.25
    """Key-value cache of each rank on a CPU."""
    gpu_memory_utilization: float = 0.5
    """Part of a GPU's memory for the engine."""
    offload_training: bool = False
    """While engines inside the ranks generate, gradients give up their memory and the optimizer's state is on the host;
    see `engine/offload.py`."""
    enforce_eager: bool = True
    """False lets vLLM compile and capture graphs: slower start, faster decoding."""
    quantization: QuantizedFormat | None = None
    """fp8 or int8: engines hold quantised weights and quantise their activations. Each sync rounds the policy's weights
    once. mismatch/* tells what it costs; with the same model.quantization, nothing."""
    record_routes: bool = False
    """Record the experts that the engine chose for each token, and send it there again in every pass over the policy.
    Needs model.moe_routing_replay, colocated engines with enforce_eager, and does without the cache of prefixes."""
    max_mismatch: float | None = None
    """Stop the run when a step's mismatch/log_prob_abs_diff_mean, nats, is above this. null: never."""
    engine_args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of vLLM's engine, by its own names."""


@dataclass
class SyncConfig:
    """Sending the policy's weights to the engines."""

    bucket_megabytes: float = 256.0
    """Weights travel in buckets of at most this size (a single larger tensor travels alone)."""
    transport: SyncTransport = SyncTransport.auto
    """How disaggregated engines get their weights: through a folder, over the network by TCP, or in a process group of
    all ranks and engines, which is NCCL's between GPUs and else gloo's. auto: see `trainer/ways.py`."""
    folder: str | None = None
    """Folder of that transport; null: this machine's shared memory, or the run's folder if a Slurm job has tasks for
    engines."""
    delta: float = 0.0
    """Disaggregated engines are sent only the elements that have changed where these are at most this share of a
    message, which takes both sides memory for a copy of what is sent; 0: always all elements, and no copy."""
    timeout_seconds: float = 300.0
    """Limit of any wait for a peer's weights."""
    verify: SyncVerify = SyncVerify.off
    """After each sync compare the engine's log-probs on probe prompts with the policy's, and on the way checksums of
    its parameters: of every sixteenth, others each time (sample), or of all (full). A difference stops the run."""
    verify_tolerance: float = 1e-3
    """Largest log-prob difference that `verify` accepts, nats; for bfloat16 about 0.1."""


@dataclass
class RewardFunctionConfig:
    """One reward function."""

    name: str = MISSING
    """A built-in reward, or a dotted path 'package.module:function'."""
    weight: float = 1.0
    """Factor of this reward in the total."""
    args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments bound to the function."""


@dataclass
class RewardModelConfig:
    """A learned reward: a Hugging Face classifier of one label."""

    hf_path: str | None = None
    """Folder of a *ForSequenceClassification, or with kind process *ForTokenClassification; null: no learned reward."""
    kind: RewardModelKind = RewardModelKind.outcome
    """outcome: the score of a completion's last token. process: a score for each step, at its last token."""
    engine: RewardEngine = RewardEngine.megatron
    """megatron: the training ranks hold it beside the policy. vllm: a server that the first rank starts and asks."""
    engine_args: dict[str, Any] = field(default_factory=dict)
    """With engine vllm: further arguments of its server, by vLLM's names, e.g. gpu_memory_utilization; the others are
    those of rollout. It runs where the first rank does."""
    scale: RewardScale = RewardScale.score
    """The score itself, or, of a model that was trained on right and wrong, the probability of right or its logarithm.
    The logarithms of steps add up to that of all being right, which no further step can raise."""
    weight: float = 1.0
    """Factor of this reward in the total."""
    step_separator: str = "\n"
    """With kind process: a token whose text has this in it ends a step, as the last token does; '': every token."""


@dataclass
class OverlongConfig:
    """DAPO's soft punishment of length."""

    buffer_tokens: int | None = None
    """Over the last this many tokens below rollout.sampling.max_response_tokens it grows; null: no punishment."""
    penalty: float = 1.0
    """Taken off the reward of a completion of full length."""


@dataclass
class RewardsConfig:
    """Scores of completions; the total is the weighted sum."""

    functions: list[RewardFunctionConfig] = field(default_factory=list)
    """The reward functions."""
    num_workers: int = 2
    """Processes of each engine for functions of your own; 0 calls them in the rank, where nothing limits them."""
    timeout_seconds: float = 60.0
    """Limit of one call; a function that takes longer loses its sample."""
    memory_gigabytes: float = 4.0
    """Limit of a process's data; a function that needs more loses its sample."""
    lost_value: float = 0.0
    """Value of a reward that was lost. How many were is shown as reward/lost."""
    model: RewardModelConfig = field(default_factory=RewardModelConfig)
    """A learned reward."""
    overlong: OverlongConfig = field(default_factory=OverlongConfig)
    """Punishment of length."""


@dataclass
class AdvantageConfig:
    """From rewards to advantages. An estimator takes those of these settings that its parameters name."""

    estimator: str = "group_relative"
    """A name of `trainer/estimators.py`, or a dotted path 'package.module:function'."""
    normalize_by_std: bool = True
    """group_relative: GRPO divides by the group's standard deviation; Dr.GRPO does not."""
    std_epsilon: float = 1e-6
    """Added to a standard deviation that is divided by."""
    gamma: float = 1.0
    """monte_carlo, td0, gae: discount per trained token."""
    lam: float = 0.95
    """gae: lambda."""
    baseline_decay: float = 0.9
    """running_baseline: what of the old mean stays after a step."""
    whiten: Whitening = Whitening.none
    """Afterwards divide by the standard deviation over the global batch's tokens; full: also subtract the mean."""
    args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of a function of your own."""


@dataclass
class PolicyLossConfig:
    """The loss of the policy. It takes those of these settings that its parameters name."""

    name: str = "ppo_clip"
    """A name of `trainer/policy_losses.py`, or a dotted path 'package.module:function'."""
    clip_low: float = 0.2
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio is clipped above at 1 + clip_high."""
    dual_clip: float | None = None
    """For negative advantages the loss is bounded by dual_clip * |advantage|; > 1. null: no bound."""
    args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of a function of your own."""


@dataclass
class CorrectionConfig:
    """What is done about the difference between the engine that sampled and the policy that trains."""

    method: CorrectionMethod = CorrectionMethod.metrics_only
    """metrics_only reports the ratios; the others weigh the tokens of the loss."""
    level: CorrectionLevel = CorrectionLevel.token
    """What the ratio is taken over."""
    low: float = 0.5
    """Lower bound of the ratio itself; truncate does not use it."""
    high: float = 2.0
    """Upper bound of the ratio itself."""


@dataclass
class KLConfig:
    """Penalty for leaving the reference policy."""

    coefficient: float = 0.0
    """0: no reference policy is kept. With a target: where the coefficient starts. Of the recipes rl and sft."""
    estimator: KLEstimator = KLEstimator.k3
    """Estimator of the KL from samples. exact: of the whole distributions at each position, in the loss; the one that
    recipe sft takes, whose tokens are no samples of the policy."""
    direction: Divergence = Divergence.reverse
    """With estimator exact: KL(policy || reference), KL(reference || policy) (forward), or what is between them."""
    mixture: float = 0.5
    """With direction jensen_shannon: the reference's part of the mixture, in (0, 1)."""
    place: KLPlace = KLPlace.loss
    """In the loss, or in the reward: of each token for an estimator over tokens, else summed over the completion."""
    weighted: bool = False
    """In the loss: times the importance weight, with which k1 and k3 are right in their gradient too."""
    target: float | None = None
    """KL per token, nats, that the coefficient is adapted to; null: it stays."""
    horizon: int = 10000
    """With a target: samples over which the coefficient changes by e^0.2 at most."""
    reference: KLReference = KLReference.fixed
    """fixed: the model the run started from. refreshed: the policy of refresh_interval steps ago or less.
    moving_average: of the policies after each step."""
    refresh_interval: int = 100
    """With reference refreshed: steps between copies of the policy."""
    moving_average_decay: float = 0.99
    """With reference moving_average: what of the old average stays after a step."""
    reference_path: str | None = None
    """Another Hugging Face checkpoint as the reference: the teacher of a distillation. Same tokens as the policy's."""


@dataclass
class CriticConfig:
    """The value function, of a run whose advantage estimator names `values`, or that shares its backbone with one."""

    shared: bool = False
    """A value head on the policy's backbone, trained with the policy by its optimizer; false: a model of its own."""
    coefficient: float = 0.5
    """With shared: weight of the value loss in the policy's."""
    hf_path: str | None = None
    """Checkpoint that it starts from, a language model or a reward model; null: model.hf_path."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-5))
    """Its own optimizer."""
    warmup_steps: int = 0
    """First rollout steps in which the critic alone is trained."""
    clip: float | None = None
    """Values may move this far from those before the step's first update, in units of reward; null: any way."""


@dataclass
class DynamicSamplingConfig:
    """DAPO's refilling of the batch where all completions of a prompt have the same reward, and so no advantage."""

    max_rounds: int = 1
    """Generations of a step at most; 1: no refilling. After the last round the batch is filled with the rest."""


@dataclass
class PreferenceConfig:
    """The loss of the recipes preference and reward_model; it takes the settings that it names."""

    loss: str = "dpo"
    """A name of `trainer/preference_losses.py`, or a dotted path 'package.module:function'."""
    beta: float = 0.1
    """Inverse temperature of the implicit reward."""
    label_smoothing: float = 0.0
    """Part of the pairs that are taken to be labelled the wrong way round."""
    length_normalized: bool = False
    """dpo, ipo: of log-probs averaged over a completion's tokens, not summed."""
    sft_coefficient: float = 0.0
    """Weight of the mean negative log-likelihood of the chosen completions."""
    args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the loss."""


@dataclass
class SupervisedConfig:
    """The loss of the recipe sft."""

    loss: str = "sft"
    """A name of `trainer/supervised_losses.py`, or a dotted path 'package.module:function'."""
    args: dict[str, Any] = field(default_factory=dict)
    """Arguments of the loss."""
    coefficient: float = 1.0
    """Weight of this loss; 0 leaves the divergence of algorithm.kl alone, as in distillation."""


@dataclass
class AlgorithmConfig:
    """The objective: independent choices, of which named algorithms are presets (configs/algorithms)."""

    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    """From rewards to advantages."""
    policy_loss: PolicyLossConfig = field(default_factory=PolicyLossConfig)
    """The loss of the policy."""
    correction: CorrectionConfig = field(default_factory=CorrectionConfig)
    """The difference between the engine that sampled and the policy that trains."""
    kl: KLConfig = field(default_factory=KLConfig)
    """Penalty for leaving the reference policy."""
    critic: CriticConfig = field(default_factory=CriticConfig)
    """The value function."""
    dynamic_sampling: DynamicSamplingConfig = field(default_factory=DynamicSamplingConfig)
    """Refilling of the batch."""
    supervised: SupervisedConfig = field(default_factory=SupervisedConfig)
    """The loss of supervised fine-tuning."""
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    """The loss on preferences."""
    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus."""
    aggregation: Aggregation = Aggregation.token_mean
    """How per-token losses become one number."""
    token_sum_norm: float | None = None
    """Tokens per sequence that 'token_sum_norm' divides by; null: sampling.max_response_tokens."""


@dataclass
class TrainConfig:
    """Length of the run and size of its steps."""

    num_steps: int = 100
    """RL: rollout steps. SFT: optimizer steps."""
    global_batch_size: int | None = None
    """Samples of one optimizer step. RL: null takes all samples of the rollout step (exactly on-policy)."""
    num_epochs_per_step: int = 1
    """RL: passes over each rollout batch."""
    max_rollbacks: int = 3
    """Times that the run goes back to a checkpoint because of its numbers, before it stops."""
    micro_batch_tokens: int = 8192
    """Tokens of one packed row, over all its context-parallel ranks; longer single sequences get a row of their own."""


@dataclass
class CheckpointConfig:
    """Training state on disk."""

    save_interval: int = 50
    """Steps between checkpoints; 0: only at the end."""
    asynchronous: bool = True
    """Write in the background, from a copy on the host; false: training waits until a checkpoint is complete."""
    keep_last: int | None = None
    """Keep this many newest checkpoints; null: all."""
    keep_best: int = 0
    """Keep besides this many with the best `best_metric`; needs keep_last."""
    best_metric: str | None = None
    """Metric of the saved step that keep_best compares, e.g. 'eval/heldout/accuracy'; '-' before the name: lowest."""
    export_hf: bool = True
    """Write the final policy as a Hugging Face checkpoint to hf/."""


@dataclass
class EvaluationConfig:
    """Evaluation on data.eval with vLLM."""

    interval: int = 0
    """Steps between evaluations; 0: only before and after training."""
    name: str = "heldout"
    """Name in the metrics: eval/<name>/accuracy."""
    num_samples_per_prompt: int = 1
    """k of pass@k; 1 with temperature 0 is greedy accuracy."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    """Nucleus of the sampling."""
    max_prompts: int | None = None
    """Evaluate the first this many prompts; null: all."""
    correct_reward: str | None = None
    """The reward that decides correctness (value >= 1); null: the first of rewards.functions."""


@dataclass
class ConvergenceConfig:
    """When an RL run is said to have settled; it goes on all the same."""

    window: int = 20
    """Steps that are looked at."""
    loss_variance: float = 1e-4
    """Variance of the policy loss below which it counts as stable."""
    policy_change: float = 1e-3
    """Mean change of log-probs in a step, nats, below which the policy counts as at rest."""


@dataclass
class LoggingConfig:
    """What a run shows."""

    tensorboard: bool = True
    """Write TensorBoard events to <run>/tensorboard."""
    wandb_project: str | None = None
    """Log to this Weights & Biases project, if set."""
    num_logged_rollouts: int = 8
    """Sample rollouts written per step."""
    peak_tflops_per_gpu: float | None = None
    """Peak of a GPU's matrix units in the model's dtype, for throughput/mfu: the operations of the updates' passes
    forward and backward / (timing_s/train * ranks * peak); see `placement/sizes.py`. null: not reported."""
    progress: bool = True
    """Progress bars with ETA."""
    convergence: ConvergenceConfig = field(default_factory=ConvergenceConfig)
    """The convergence monitor."""


@dataclass
class GuardConfig:
    """A limit of one metric of the policy's updates; see `trainer/guards.py`."""

    metric: str = MISSING
    """Its name, e.g. 'policy/loss', 'optim/grad_norm', 'policy/approx_kl', 'mismatch/kl'."""
    above: float | None = None
    """The largest value that is allowed."""
    above_deviations: float | None = None
    """Standard deviations over the mean of the last `window` updates that are allowed."""
    window: int = 50
    """Updates that above_deviations looks back on."""
    action: GuardAction = GuardAction.skip
    """skip the update and count it, stop the run, or rollback to the last checkpoint and go on with later data."""


@dataclass
class WatchdogConfig:
    """Limits of what may be waited for; a collective's own is parallel.distributed_timeout_minutes."""

    enabled: bool = True
    """Watch every rank; false leaves only the collectives' own limit."""
    phase_minutes: float = 60.0
    """Limit of any phase of a step; the run ends with the stacks of all ranks in logs/hang."""
    phase_limits: dict[str, float] = field(default_factory=dict)
    """Limits of single phases, minutes: start, generate, score, log_probs, train, sync_weights, evaluate, save, ..."""
    heartbeat_seconds: float = 5.0
    """How often each rank writes where it is to logs/ranks."""


@dataclass
class SlurmConfig:
    """What `megatron-rl launch slurm` asks Slurm for; the options of sbatch by their own names."""

    nodes: int = 1
    """Nodes of the job."""
    ntasks_per_node: int = 8
    """Tasks of a node: one per GPU, or per CPU slot. Each is a training rank or, at the end, part of an engine."""
    gpus_per_node: int | None = None
    """GPUs of a node; null: the partition's default."""
    cpus_per_task: int | None = None
    """CPU cores of a rank; null: the partition's default."""
    time: str | None = None
    """Limit of one attempt, e.g. '24:00:00'; the run saves before it and is queued again."""
    partition: str | None = None
    """Partition; null: the cluster's default."""
    account: str | None = None
    """Account that is charged."""
    qos: str | None = None
    """Quality of service."""
    signal_seconds: int = 180
    """The ranks are told to save this long before the time limit; longer than a step and a checkpoint."""
    max_restarts: int = 3
    """Starts after a failure inside one job, besides those that Slurm makes."""
    container: str | None = None
    """Image that the ranks run in; null: none."""
    container_runtime: str = "pyxis"
    """'pyxis' or 'apptainer'."""
    container_mounts: str | None = None
    """'from:to,...' besides the working folder."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables of the job, e.g. MASTER_ADDR, MEGATRON_RL (the program)."""
    sbatch_args: list[str] = field(default_factory=list)
    """Further options of sbatch, e.g. '--constraint=h200'."""
    script: str = "slurm/train.sbatch"
    """The job."""


@dataclass
class Config:
    """A run."""

    name: str = MISSING
    """Name of the run: its folder below output_dir."""
    recipe: Recipe = Recipe.rl
    """rl or sft."""
    seed: int = 1234
    """Seed of data order, sampling and initialisation."""
    output_dir: str = "runs"
    """Parent of the run's folder."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The policy."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How the training ranks share the model and the batch."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer and schedule."""
    data: DataConfig = field(default_factory=DataConfig)
    """Training and evaluation data."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """Generation."""
    sync: SyncConfig = field(default_factory=SyncConfig)
    """Weights to the engines."""
    rewards: RewardsConfig = field(default_factory=RewardsConfig)
    """Scores."""
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    """The objective."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Length and sizes."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Training state on disk."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Held-out evaluation."""
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """What a run shows."""
    guards: list[GuardConfig] = field(default_factory=list)
    """Limits of metrics, e.g. of the KL, and what is done beyond them."""
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    """Limits of waiting."""
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    """What `megatron-rl launch slurm` asks for."""
