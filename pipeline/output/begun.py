"""Plans a job so that its prompts are made, and its units cut, as in the rows that its output holds already."""

from model.checkpoint.reader import Checkpoint
from pipeline.config.job import Job
from pipeline.core.types import UNIT_RULES
from pipeline.output.found_units import stored_units
from pipeline.output.ledger import Ledger
from pipeline.planning.fingerprint import PROMPT_RULES
from pipeline.planning.packing import StoredUnits
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
    begun, stored = read_begun(job)
    return make_plan(
        job,
        checkpoint_identity=checkpoint.identity(),
        texts=texts,
        begun=begun,
        stored=stored,
        allow_unreadable=allow_unreadable,
    )


def read_begun(job: Job) -> tuple[Begun, StoredUnits]:
    """Return the facts about prompts and about units that the output of a job was begun with.

    Raises StorageError if the storage fails.
    """
    ledger = Ledger(job.output.path)
    if (old := ledger.last_plan()) is None:
        # Parts and segments tell it if the plan is lost. Whether they are this job's is for Ledger.check.
        return stored_units(ledger.look())
    prompts, units = int(old.fingerprint.fields.get(PROMPT_RULES, 1)), old.unit_rules
    # Without rows, an old plan is replaced.
    replaced = min(prompts, units) == 1 and not ledger.has_rows()
    # A job that is not made of a prompt column is refused by the Ledger, which says why.
    if prompts == 1 and (replaced or job.input.prompt_column is None):
        prompts = RULES
    # The day counts even if no row is saved yet, because plan.json keeps it, and so do the units.
    begun = Begun(prompts, old.prompt_date or old.created[:10])
    if replaced:
        return begun, StoredUnits()
    return begun, StoredUnits(min(units, UNIT_RULES), old.units_stored, old.listing, old.fingerprint.digest)
