"""A relay and an inbox made of omni-box. README.md gives the reasons for its settings."""

import asyncio
import contextlib
import logging
import os
import signal
import sys

import structlog
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from omni_box import InboxConsumerRunner, OutboxPublisher
from omni_box.core.converters import RawEventConverter
from omni_box.infra.brokers.kafka import KafkaEventConsumer, KafkaEventPublisher
from omni_box.infra.storage.postgres import (
    InboxEventDBBase,
    OutboxEventDBBase,
    PostgresInboxRepository,
    PostgresOutboxRepository,
)
from sqlalchemy import URL, text
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase

# More workers are slower; larger batches drain somewhat faster, but a kill repeats up to WORKERS * BATCH rows.
WORKERS = 8
BATCH = 1000

# One worker looks for rows often: if all did, that alone would fill half a core, and events would take longer.
POLL_SECONDS = 0.01
OTHERS_POLL_SECONDS = 0.1


class Base(DeclarativeBase):
    pass


class Outbox(Base, OutboxEventDBBase):
    pass


class Inbox(Base, InboxEventDBBase):
    pass


def connect():
    environment = os.environ
    url = URL.create(
        "postgresql+asyncpg",
        username=environment["PGUSER"],
        host=environment["PGHOST"],
        port=int(environment["PGPORT"]),
        database=environment["PGDATABASE"],
    )
    return create_async_engine(url, pool_size=WORKERS)


async def create():
    engine = connect()
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    await engine.dispose()


# A stop waits for the end of the batch: rows of a batch that is cut short stay locked for five minutes.
async def work(number, sessions, broker, stop):
    while not stop.is_set():
        async with sessions() as session, session.begin():
            repository = PostgresOutboxRepository(session, model_class=Outbox)
            result = await OutboxPublisher(repository, broker).publish_batch(f"worker-{number}", BATCH)
        if not result.processed_event_ids:
            await asyncio.sleep(OTHERS_POLL_SECONDS if number else POLL_SECONDS)


async def relay():
    stop = asyncio.Event()
    for number in signal.SIGTERM, signal.SIGINT:
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    engine = connect()
    sessions = async_sessionmaker(engine, expire_on_commit=False)
    producer = AIOKafkaProducer(bootstrap_servers=os.environ["BROKERS"], acks="all", enable_idempotence=True)
    async with producer, asyncio.TaskGroup() as workers:
        broker = KafkaEventPublisher(producer, RawEventConverter())
        for number in range(WORKERS):
            workers.create_task(work(number, sessions, broker, stop))
    await engine.dispose()


class Transactions:
    def __init__(self, sessions):
        self.sessions = sessions

    @contextlib.asynccontextmanager
    async def transaction(self):
        async with self.sessions() as session, session.begin():
            yield PostgresInboxRepository(session, model_class=Inbox)


async def handle(event, repository):
    call = text("SELECT bench_effect(:id, :key)")
    await repository._session.execute(call, {"id": event.message_id, "key": event.event_type})


async def inbox():
    engine = connect()
    transactions = Transactions(async_sessionmaker(engine, expire_on_commit=False))
    consumer = AIOKafkaConsumer(
        os.environ["TOPIC"],
        bootstrap_servers=os.environ["BROKERS"],
        group_id="omni-box",
        enable_auto_commit=False,
        auto_offset_reset="earliest",
    )
    runner = InboxConsumerRunner(
        KafkaEventConsumer(consumer), transactions, handle, worker_id="bench", consumer_group="omni-box"
    )
    await runner.start()
    working = asyncio.create_task(runner.run_forever())
    stop = asyncio.Event()
    for number in signal.SIGTERM, signal.SIGINT:
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await stop.wait()
    working.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await working
    await runner.stop()
    await engine.dispose()


structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
match sys.argv[1:]:
    case ["create"]:
        asyncio.run(create())
    case ["relay"]:
        asyncio.run(relay())
    case ["inbox"]:
        asyncio.run(inbox())
    case _:
        sys.exit("usage: omni-box create | relay | inbox")
