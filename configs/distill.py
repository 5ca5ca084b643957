"""Audio reasoning distillation: a text teacher's reasoning into an audio language model.

Variants:
  (none)      the paper's recipe: Qwen2.5-Omni-7B from Qwen3-8B, layer-wise, with acoustic teacher
  ARM         one arm of the paper's tables, a name of `ARMS`: the same with another loss
  :ablations  all arms, one after the other, and their table
  :lora       low-rank factors instead of all parameters
  :demo       a tiny student and teacher, made here, on simulated auscultation; offline, minutes
"""

from ml_collections import ConfigDict

from configs.common import base

# Changes of config.loss; the paper's tables (acoustic_005: α_ac = 0.05).
ARMS = {
    "sft": {"text_weight": 0.0, "acoustic_weight": 0.0},
    "top": {"layers_weight": 0.0, "acoustic_weight": 0.0},
    "layers_k1": {"every": 1, "acoustic_weight": 0.0},
    "layers_k3": {"every": 3, "acoustic_weight": 0.0},
    "layers_k7": {"every": 7, "acoustic_weight": 0.0},
    "layers_k14": {"every": 14, "acoustic_weight": 0.0},
    "acoustic_001": {"acoustic_weight": 0.01},
    "acoustic_005": {"acoustic_weight": 0.05},
    "acoustic_010": {"acoustic_weight": 0.1},
    "kl": {"divergence": "forward_kl"},
}
VARIANTS = ("", *ARMS, "ablations", "lora", "demo")


def get_config(variant: str = "") -> ConfigDict:
    """The config of a variant."""
    if variant not in VARIANTS:
        raise ValueError(f"configs/distill.py has no variant {variant!r}; there are {VARIANTS}")
    config = _paper()
    if variant in ARMS:
        config.loss.update(ARMS[variant])
    if variant == "ablations":
        config.arms = ConfigDict({name: dict(changes) for name, changes in ARMS.items()})
    if variant == "lora":
        config.lora.enabled = True
        config.optimizer.learning_rate = 1e-4
    if variant == "demo":
        _demo(config)
    return config


def _paper() -> ConfigDict:
    config = base()
    for block in ("encoder", "augment"):
        del config[block]
    config.method = "distill"  # what is run: acula, distill, pretrain, textualize
    config.data = ConfigDict(
        {
            "questions": "",  # training questions, textualised; "" simulates them (demo)
            "format": "questions",  # questions (our JSONL), cota, iemocap (folder), emotions
            "audio": "",  # folder of the recordings, where paths are not relative to the file
            "mmau": "",  # MMAU's JSON, for evaluation; its recordings are in `mmau_audio`
            "mmau_audio": "",  # folder of its recordings
            "emodb": "",  # manifest of emotional speech (audio_path, subject_id, emotion, split)
            "iemocap": "",  # folder of IEMOCAP_full_release
            # Leave one group of the training questions out, one model per fold: "session" of
            # IEMOCAP, "subject_id", or another key of the questions' extra; "" trains one model.
            "folds": "",
            "max_length": 2048,  # tokens of a sequence
            "buckets": (512, 1024, 2048),  # lengths that sequences are padded to, tokens
            "max_seconds": 30.0,  # what is read of a recording
            "max_bad_fraction": 0.01,  # share of the rows that may be unusable
            "decode": True,  # recordings to the last sample when they are checked; else headers
            "copies": True,  # look for near-copies of test recordings among those of training
            "workers": 0,  # processes that read and decode beside the one that trains
        }
    )
    config.student = ConfigDict(
        {
            "source": "Qwen/Qwen2.5-Omni-7B",  # an audio language model: Hub id or folder
            "dtype": "bfloat16",  # of its arithmetic; its parameters are float32
            "remat": True,  # compute a layer's activations again for its gradient, to save memory
        }
    )
    config.teacher = ConfigDict(
        {
            "source": "Qwen/Qwen3-8B",  # a text-only language model: Hub id or folder
            "dtype": "bfloat16",  # of its weights and arithmetic
            "chat": {"enable_thinking": False},  # variables of its chat template
            "mode": "live",  # live: the teacher is in the step; cached: it ran once, see `form`
            "form": "last",  # of a cached teacher: last (hidden state) or top_k (likeliest tokens)
            "top_k": 64,  # likeliest tokens that form top_k keeps
            "cache": "",  # folder; "" is WORKDIR/teacher_cache
        }
    )
    config.loss = ConfigDict(
        {
            "text_weight": 1.0,  # of the text teacher; 0: none
            "top_weight": 1.0,  # inside it: of the next-token distribution
            "layers_weight": 1.0,  # inside it: of the paired layers
            "acoustic_weight": 0.05,  # α_ac, of the student as it was, at the audio tokens; 0: none
            "monitor_acoustic": True,  # measured on held-out questions where its weight is 0 too
            "sft_weight": 0.5,  # α_SFT, of plain fine-tuning on the traces
            "every": 7,  # k: every k-th layer of the student is paired, counted from the last
            "divergence": "jsd",  # of next tokens: jsd, forward_kl, reverse_kl
            "beta": 0.5,  # of the JSD, between 0 and 1; 0.5: the symmetric one
            "temperature": 1.0,  # of both distributions
            "hidden": "jsd",  # between paired layers: jsd, cosine, mse, logit_lens
            "acoustic_hidden": "jsd",  # between student and snapshot: jsd, cosine, mse
            "chunk": 256,  # tokens whose scores over the vocabulary exist at a time
            "train_audio": True,  # whether the audio tower learns; with LoRA its modules decide
        }
    )
    config.lora = ConfigDict(
        {
            "enabled": False,  # learn low-rank factors in place of the weights
            "rank": 16,  # of the factors
            "alpha": 32.0,  # their product is scaled by alpha / rank
            # regexes of the parameters that get factors
            "modules": (r"text/layers/attention/(query|key|value|out)/kernel$",),
        }
    )
    # Nothing: the one loss above. Else name -> changes of it; each is a run, all are compared.
    config.arms = ConfigDict(convert_dict=True)
    config.seeds = (0,)  # each is a run; all are compared
    config.train.update({"batch_size": 64, "epochs": 3, "eval_every": 200})
    config.optimizer.update({"learning_rate": 1e-5, "warmup_steps": 100, "weight_decay": 0.01})
    config.evaluate = ConfigDict(
        {
            "enabled": True,  # False trains and exports without asking questions
            "answers": "generate",  # of questions with reasoning: generate, or rank the options
            "max_new_tokens": 512,  # of an answer
            "batch_size": 16,  # questions at a time
            "limit": 0,  # questions of a task; 0 takes all
        }
    )
    return config


def _demo(config: ConfigDict) -> None:
    """Three seeds of four arms; docs/distillation.md says what they show.

    Sizes, rates and weights were chosen with seed 0, on the test recordings of seed 3. Here nothing
    is of those seeds: neither models nor training, held-out or test questions.
    """
    config.seed = 7
    config.student.update({"source": "", "dtype": "float32", "remat": False})
    config.teacher.update({"source": "", "dtype": "float32"})
    config.data.update({"max_length": 160, "buckets": (88, 160)})
    config.world = ConfigDict(
        {
            "base": 600,  # recordings that the student is pre-trained on
            "reasoning": 60,  # recordings with reasoning to distil from
            "label_noise": 0.4,  # share of their reasoning traces that conclude wrongly
            "valid": 60,  # held out: losses and the acoustic divergence are watched on them
            "test": 300,  # recordings that the questions are asked about
            "test_seed": 1000,  # of the test recordings, whatever config.seed is
            "texts": 3000,  # textual questions of the teacher
            "read": 1500,  # of them, what the student has read as well
            "seconds": 2.0,  # of a recording
            "student": {
                "width": 64, "mlp_width": 192, "depth": 6, "heads": 4,
                "mels": 64, "audio_width": 48, "audio_depth": 2,
            },
            "teacher": {"width": 96, "mlp_width": 256, "depth": 8, "heads": 4},
        }
    )  # fmt: skip
    config.stages = ConfigDict(
        {
            "student": {"steps": 500, "batch_size": 32, "learning_rate": 1.5e-3},
            "teacher": {"steps": 300, "batch_size": 32, "learning_rate": 2e-3},
        }
    )
    config.arms = ConfigDict(
        {
            "sft": dict(ARMS["sft"]),
            "top": dict(ARMS["top"]),
            "layers": {"acoustic_weight": 0.0},
            "layers + acoustic": {},
        }
    )
    # The divergence over 64 channels is small, and so is what 0.05 of it would hold.
    config.loss.update({"every": 2, "layers_weight": 0.2, "acoustic_weight": 10.0})
    config.seeds = (3, 4, 5)
    config.train.update({"batch_size": 32, "steps": 150, "eval_every": 50, "log_every": 50})
    config.optimizer.update({"learning_rate": 1e-3, "warmup_steps": 20})
    config.evaluate.update({"max_new_tokens": 72, "batch_size": 64})
