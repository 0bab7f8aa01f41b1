"""Data: corpora, tokenisation and tasks."""

from mi_jax.data.corpus import Contexts as Contexts
from mi_jax.data.corpus import TextError as TextError
from mi_jax.data.corpus import contexts as contexts
from mi_jax.data.corpus import python_topics as python_topics
from mi_jax.data.corpus import read_documents as read_documents
from mi_jax.data.task import Task as Task
from mi_jax.data.tokenizer import Tokenizer as Tokenizer
from mi_jax.data.tokenizer import load_tokenizer as load_tokenizer
from mi_jax.data.tokenizer import tokenizer_from_gguf as tokenizer_from_gguf
