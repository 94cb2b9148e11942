"""What users of omni-box do with it, beside postbox: one command a run, whose answer is JSON.

The database is in DATABASE_URL, the brokers are in BROKERS.
"""

import asyncio
import json
import logging
import os
import signal
import sys
import time
from datetime import timedelta
from uuid import UUID, uuid4

import asyncpg
import structlog
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from omni_box import OmniBoxDomainService, OmniBoxMaintenanceService, OutboxPublisher
from omni_box.core.converters import EnvelopeEventConverter, RawEventConverter, SchemaVersionedConverter
from omni_box.infra.brokers.kafka import KafkaEventConsumer, KafkaEventPublisher
from omni_box.infra.storage.postgres import (
    OutboxEventDBBase,
    OutboxEventPartitionedDBBase,
    PostgresOutboxRepository,
)
from omni_box.utils import utc_now
from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase

CONVERTERS = {
    "raw": RawEventConverter,
    "versioned": SchemaVersionedConverter,
    "envelope": EnvelopeEventConverter,
}


class Base(DeclarativeBase):
    pass


class Outbox(Base, OutboxEventDBBase):
    pass


class Partitioned(Base, OutboxEventPartitionedDBBase):
    pass


MODEL = Partitioned if os.environ.get("PARTITIONED") else Outbox

engine = create_async_engine("postgresql+asyncpg://", async_creator=lambda: asyncpg.connect(os.environ["DATABASE_URL"]))
sessions = async_sessionmaker(engine, expire_on_commit=False)


class Repository:
    """One of theirs in a transaction, as their users have it."""

    async def __aenter__(self):
        self.session = sessions()
        await self.session.begin()
        return PostgresOutboxRepository(self.session, model_class=MODEL)

    async def __aexit__(self, failed, *_):
        await (self.session.rollback() if failed else self.session.commit())
        await self.session.close()


async def create():
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all, tables=[MODEL.__table__])


def event(topic, key, payload, **optional):
    return OmniBoxDomainService().create_outbox_event(
        "order", uuid4(), "order.paid", topic, key, payload, **optional
    )


async def write(topic):
    """Events of each kind: says their ids, and which of them are not due."""
    full = event(
        topic,
        "a",
        {"zeta": 1, "b": "grüße \"…\" \n\t \u2028 🦀", "list": [1, 2.5, None, True], "aa": {"y": {}, "x": []}},
        headers={"x-tenant": "übung", "event_type": "of the row", "tabbed": "a\tb", "A": "1"},
        schema_version="2.1",
        idempotency_key="once",
        trace_id="t-1",
        correlation_id="c-1",
        causation_id="d-1",
    )
    again = event(topic, "a", {"n": "never"}, idempotency_key="once")
    later = event(topic, "a", {"n": "later"}, scheduled_at=utc_now() + timedelta(hours=1))
    many = [
        event(topic, "b", {"n": 9007199254740993, "e": 1.5e-7, "f": 0.1, "id": uuid4(), "at": utc_now()}),
        event(topic, "ключ", {"payload": {"inner": 1}, "trace_id": "of the payload"}, trace_id="t-2"),
        event(topic, "c", {"trace_id": "alone"}, headers={"only": "one"}, schema_version="ü"),
        event(topic, "c", {"n": 2}, headers={"message_id": "its own", "source": "shop"}),
        event(topic, "d" * 255, {"n": 3}, headers={"k" * 64: "v" * 512}, correlation_id="c" * 64),
    ]
    async with Repository() as repository:
        first = await repository.create(full)
        second = await repository.create(again)
        assert first.id == second.id == full.id, "the idempotency key did not hold"
        await repository.create(later)
        await repository.bulk_create(many)
    return {"due": [str(event.id) for event in [full, *many]], "later": [str(later.id)]}


async def publish(converter):
    """Their publisher, until it finds nothing."""
    async with AIOKafkaProducer(bootstrap_servers=os.environ["BROKERS"], acks="all", enable_idempotence=True) as producer:
        broker = KafkaEventPublisher(producer, CONVERTERS[converter]())
        published = 0
        while True:
            async with Repository() as repository:
                result = await OutboxPublisher(repository, broker).publish_batch("theirs", 100)
            if not result.processed_event_ids:
                return published
            published += len(result.processed_event_ids)


async def read(topic, count):
    """So many records, as their consumer gives them, and as they are."""
    consumer = AIOKafkaConsumer(
        topic,
        bootstrap_servers=os.environ["BROKERS"],
        group_id=f"read-{uuid4()}",
        enable_auto_commit=False,
        auto_offset_reset="earliest",
    )
    theirs = KafkaEventConsumer(consumer)
    await theirs.start()
    found = []
    for _ in range(int(count)):
        message = await asyncio.wait_for(theirs.getone(), 30)
        await message.ack_handle.commit()
        record = message.raw_message
        found.append(
            {
                "message": {
                    name: getattr(message, name)
                    for name in (
                        "message_id",
                        "event_type",
                        "source",
                        "payload",
                        "headers",
                        "trace_id",
                        "correlation_id",
                        "causation_id",
                        "schema_version",
                    )
                },
                "key": record.key.decode(),
                "partition": record.partition,
                "is set by": record.timestamp_type,
                "is of now": abs(time.time() * 1000 - record.timestamp) < 600_000,
                "headers": [[name, value.decode()] for name, value in record.headers],
                "value": json.loads(record.value),
            }
        )
    await theirs.stop()
    return found


async def work(workers, batch):
    """Their workers in a loop, until SIGTERM; a batch that has begun is ended."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)

    async def worker(number, broker):
        while not stop.is_set():
            async with Repository() as repository:
                result = await OutboxPublisher(repository, broker).publish_batch(f"theirs-{number}", int(batch))
            if not result.processed_event_ids:
                await asyncio.sleep(0.05)

    producer = AIOKafkaProducer(bootstrap_servers=os.environ["BROKERS"], acks="all", enable_idempotence=True)
    async with producer, asyncio.TaskGroup() as tasks:
        broker = KafkaEventPublisher(producer, RawEventConverter())
        for number in range(int(workers)):
            tasks.create_task(worker(number, broker))
        print("working", file=sys.stderr, flush=True)


async def hold(rows):
    """Locks rows, as one of their workers that commits that before it publishes, and stays."""
    async with Repository() as repository:
        held = await repository.fetch_and_lock_pending(int(rows), "theirs", 300)
    print(f"holding {len(held)}", file=sys.stderr, flush=True)
    await asyncio.sleep(600)


async def read_back():
    """Each row as their repository makes an event of it: how many there are in each state, and which it refuses."""
    states, refused = {}, []
    async with Repository() as repository:
        for row in (await repository._session.execute(select(MODEL))).scalars():
            try:
                event = repository._to_entity(row)
            except Exception as error:
                refused.append([str(row.id), str(error)])
                continue
            state = f"{event.status.value}{', locked' if event.is_locked else ''}"
            states[state] = states.get(state, 0) + 1
    return {"states": states, "refused": refused}


async def release_stale_locks(seconds):
    async with Repository() as repository:
        return await OmniBoxMaintenanceService(repository).release_stale_locks(int(seconds))


async def cleanup_old_events(days):
    async with Repository() as repository:
        return await OmniBoxMaintenanceService(repository).cleanup_old_events(int(days))


async def requeue_failed(id):
    async with Repository() as repository:
        return await repository.requeue_failed(UUID(id))


async def force_unlock(id):
    async with Repository() as repository:
        return await repository.force_unlock(UUID(id), "by hand")


async def main(name, *arguments):
    answer = await globals()[name](*arguments)
    await engine.dispose()
    print(json.dumps(answer))


structlog.configure(
    wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
    logger_factory=structlog.PrintLoggerFactory(sys.stderr),
)
asyncio.run(main(*sys.argv[1:]))
