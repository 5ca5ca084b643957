"""Recordings put into words by an audio language model, for a text-only teacher.

    python -m medalign_jax.main --config=configs/textualize.py --workdir=DIR
        --config.data.questions=train.jsonl --config.model.source=Qwen/Qwen2.5-Omni-7B

writes DIR/textualised.jsonl, which configs/distill.py takes as data.questions, and
DIR/failed.jsonl. The paper (arXiv 2509.18579, section 3.1) grounds descriptions in the reasoning
trace, so that they hold what the reasoning relies on; it does not print its prompt, this one is
ours.
"""

from ml_collections import ConfigDict

from configs.common import base

SYSTEM = "You are a careful listener who puts recordings into words for readers who cannot hear."
TEXT = """\
Describe this recording so that a reader who cannot hear it can reason about it as well as a \
listener.

Say what is audible, in the order in which it comes: what makes the sounds, how loud, how high, \
how fast and how regular they are, and how that changes. Of speech give the words, the speakers, \
their tone and their emotion; of music the instruments, tempo, melody and mood; of heart and \
breath sounds the rate and rhythm, the phase in which each sound falls, its pitch, its quality \
and its loudness. Then say what the background and the quality of the recording are.

Report what is heard and nothing else: answer no question, draw no conclusion, name no diagnosis. \
Write one paragraph of plain text of at most 150 words."""
NOTES = """


Below are notes of someone who reasoned about this very recording. Let them tell you which details \
matter: mention each audible detail that they rely on, if you hear it too. Where they and the \
recording disagree, report what you hear. Do not mention the notes, and do not give away the \
answer that they come to.

Notes:
{reasoning}"""


def get_config(variant: str = "") -> ConfigDict:
    """The config; there are no variants."""
    if variant:
        raise ValueError(f"configs/textualize.py has no variant {variant!r}, nor any other")
    config = ConfigDict()
    config.method = "textualize"  # what is run: acula, distill, pretrain, textualize
    config.seed = 0  # of the tokens that are drawn
    config.model = ConfigDict(
        {
            "source": "",  # an audio language model: Hub id or folder
            "dtype": "bfloat16",  # of the model: bfloat16 or float32
        }
    )
    config.data = ConfigDict(
        {
            "questions": "",  # file of questions with reasoning
            "format": "questions",  # questions (our JSONL), cota, iemocap (folder), emotions
            "audio": "",  # of cota: folder of the recordings, where paths are not relative to it
            "max_length": 4096,  # tokens of prompt and description
            "max_seconds": 30.0,  # what is read of a recording
            "max_bad_fraction": 0.01,  # of the file's rows
        }
    )
    config.prompt = ConfigDict(
        {
            "system": SYSTEM,  # the role that the model is given
            "text": TEXT,  # what it is asked
            "grounded": True,  # with `notes`; records without reasoning then fail
            "notes": NOTES,  # what is added where there is reasoning; {reasoning} is its place
            # Of a trace in stages; the summary is left out, because it says the answer.
            "stages": ("planning", "caption", "reasoning"),
        }
    )
    config.generate = ConfigDict(
        {
            "max_new_tokens": 320,  # of a description
            "temperature": 0.7,  # 0 takes the likeliest token each time
            "top_p": 0.9,  # tokens are drawn from the likeliest that reach this share
            "batch_size": 16,  # of all devices together
            "min_words": 5,  # fewer describe nothing
        }
    )
    config.mesh = ConfigDict(base().mesh)
    return config
