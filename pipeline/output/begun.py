"""Plans a job so that its prompts are made as in the rows that its output holds already."""

from model.checkpoint.reader import Checkpoint
from pipeline.config.job import Job
from pipeline.output.ledger import Ledger
from pipeline.planning.fingerprint import PROMPT_RULES
from pipeline.planning.plan import Plan, make_plan
from pipeline.planning.prompts import Begun, read_model_texts
from pipeline.prompts.setup import RULES

OLD_RULES_NOTE = (
    "this output was begun by an earlier version: texts in prompts that spell control tokens, such as <eos>, become "
    "control tokens, as in the rows that it holds; a new output.path makes them text"
)
"""The note about an output whose prompts are made by version 1 of the rules."""


def plan_job(job: Job, checkpoint: Checkpoint, *, allow_unreadable: bool = False) -> Plan:
    """Return the plan of a job, as make_plan does, with the texts of its checkpoint and the facts that its output was
    begun with.

    Raises CheckpointError if prompts need a chat template that the checkpoint does not have.
    """
    texts = read_model_texts(job.input, checkpoint)
    return make_plan(
        job,
        checkpoint_identity=checkpoint.identity(),
        texts=texts,
        begun=_begun(job),
        allow_unreadable=allow_unreadable,
    )


def _begun(job: Job) -> Begun:
    ledger = Ledger(job.output.path)
    if (old := ledger.last_plan()) is None:
        return Begun()
    rules = int(old.fingerprint.fields.get(PROMPT_RULES, 1))
    # Without rows, the old plan is replaced. A job that is not made of a prompt column is refused by the Ledger, which
    # says why.
    if rules == 1 and (job.input.prompt_column is None or not ledger.has_rows()):
        rules = RULES
    # The day counts even if no row is saved yet, because plan.json keeps it.
    return Begun(rules, old.prompt_date or old.created[:10])
