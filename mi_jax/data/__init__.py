"""Data: corpora, tokenisation and tasks."""

from mi_jax.data import tasks as tasks
from mi_jax.data.activations import ActivationStore as ActivationStore
from mi_jax.data.activations import ActivationStream as ActivationStream
from mi_jax.data.activations import StoredActivations as StoredActivations
from mi_jax.data.activations import StoreError as StoreError
from mi_jax.data.activations import write_activations as write_activations
from mi_jax.data.corpus import Contexts as Contexts
from mi_jax.data.corpus import contexts as contexts
from mi_jax.data.corpus import python_docstrings as python_docstrings
from mi_jax.data.corpus import python_topics as python_topics
from mi_jax.data.documents import TextError as TextError
from mi_jax.data.documents import read_documents as read_documents
from mi_jax.data.task import Task as Task
from mi_jax.data.task import TaskWarning as TaskWarning
from mi_jax.data.task import warn_unless_done as warn_unless_done
from mi_jax.data.tokenizer import Tokenizer as Tokenizer
from mi_jax.data.tokenizer import load_tokenizer as load_tokenizer
from mi_jax.data.tokenizer import tokenizer_from_gguf as tokenizer_from_gguf
