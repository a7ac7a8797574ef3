"""The tasks that a Hugging Face folder can be exported for. Imports nothing: the command line lists them."""

from __future__ import annotations

__all__ = ["PARTS", "TASKS"]

#: The graphs of an encoder-decoder.
PARTS = ("encoder", "decoder")

#: Task -> the class of transformers that knows which model does it. The endings are optimum's.
TASKS: dict[str, str] = {
    "feature-extraction": "AutoModel",
    "fill-mask": "AutoModelForMaskedLM",
    "text-generation": "AutoModelForCausalLM",
    "text-generation-with-past": "AutoModelForCausalLM",
    "text2text-generation": "AutoModelForSeq2SeqLM",
    "text2text-generation-with-past": "AutoModelForSeq2SeqLM",
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "image-classification": "AutoModelForImageClassification",
    "audio-classification": "AutoModelForAudioClassification",
}
