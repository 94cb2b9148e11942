"""What users of spakky-outbox do with it, beside postbox: one command a run, whose answer is JSON.

The database is in DATABASE_URL, the brokers are in BROKERS.
"""

import json
import os
import signal
import sys
import threading
import time
from dataclasses import field
from uuid import uuid4

database = os.environ["DATABASE_URL"].split("://", 1)[1]
os.environ["SPAKKY_SQLALCHEMY__CONNECTION_STRING"] = f"postgresql+psycopg://{database}"
os.environ["SPAKKY_KAFKA__BOOTSTRAP_SERVERS"] = os.environ["BROKERS"]
os.environ["SPAKKY_KAFKA__GROUP_ID"] = f"read-{uuid4()}"
os.environ["SPAKKY_KAFKA__CLIENT_ID"] = "test"
os.environ["SPAKKY_OUTBOX__POLLING_INTERVAL_SECONDS"] = "0.05"
os.environ["SPAKKY_OUTBOX__BATCH_SIZE"] = os.environ.get("BATCH", "100")

from confluent_kafka import Consumer
from spakky.core.common.mutability import immutable
from spakky.domain.models.event import AbstractIntegrationEvent
from spakky.outbox.bus.outbox_event_bus import OutboxEventBus
from spakky.outbox.common.config import OutboxConfig
from spakky.outbox.relay.relay import OutboxRelayBackgroundService
from spakky.plugins.kafka.common.config import KafkaConnectionConfig
from spakky.plugins.kafka.event.transport import KafkaEventTransport
from spakky.plugins.sqlalchemy.common.config import SQLAlchemyConnectionConfig
from spakky.plugins.sqlalchemy.outbox.storage import SqlAlchemyOutboxStorage
from spakky.plugins.sqlalchemy.outbox.table import OutboxMessageTable
from spakky.plugins.sqlalchemy.persistency.connection_manager import ConnectionManager
from spakky.plugins.sqlalchemy.persistency.session_manager import SessionManager
from spakky.tracing.context import TraceContext
from spakky.tracing.w3c_propagator import W3CTracePropagator


class Context:
    """What the session manager asks of an application."""

    def get_context_id(self):
        return 0


@immutable
class Paid(AbstractIntegrationEvent):
    name: str = ""
    lines: list[dict[str, float | str | None]] = field(default_factory=list)


connections = ConnectionManager(SQLAlchemyConnectionConfig())
manager = SessionManager(connections)
manager.set_application_context(Context())
storage = SqlAlchemyOutboxStorage(manager, connections, OutboxConfig())


def create():
    OutboxMessageTable.metadata.create_all(connections.connection, tables=[OutboxMessageTable.__table__])


def write(topic):
    """Events by its bus, with a trace and without; the name of an event is the topic."""
    Event = type(topic, (Paid,), {})
    bus = OutboxEventBus(storage, W3CTracePropagator())
    manager.open()
    bus.send(Event())
    TraceContext.set(TraceContext.new_root())
    bus.send(Event(name="grüße \"…\" \n 🦀", lines=[{"price": 0.1, "n": 2.0, "note": None, "sku": "ü"}]))
    bus.send(Event(name="x" * 10_000))
    manager.session.commit()
    manager.close()


def relay():
    service = OutboxRelayBackgroundService(storage, KafkaEventTransport(KafkaConnectionConfig()), OutboxConfig())
    service.set_stop_event(threading.Event())
    return service


def publish():
    """Its relay, once."""
    relay()._relay_batch()


def work():
    """Its relay, until SIGTERM."""
    service = relay()
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    service.start()
    print("working", file=sys.stderr, flush=True)
    stop.wait()
    service.stop()


def hold(rows):
    """Claims rows, as its relay does before it sends them, and stays."""
    held = storage.fetch_pending(int(rows), 5)
    print(f"holding {len(held)}", file=sys.stderr, flush=True)
    threading.Event().wait(600)


def fail(id):
    """What its relay does with a message that it could not send."""
    storage.increment_retry(id)


def read(topic, count):
    consumer = Consumer({**KafkaConnectionConfig().configuration_dict, "enable.auto.commit": False})
    consumer.subscribe([topic])
    found = []
    while len(found) < int(count):
        record = consumer.poll(30)
        assert record is not None and record.error() is None, f"{len(found)} records of {topic}: {record and record.error()}"
        key = record.key()
        found.append(
            {
                "key": None if key is None else key.decode(),
                "partition": record.partition(),
                "is set by": record.timestamp()[0],
                "is of now": abs(time.time() * 1000 - record.timestamp()[1]) < 600_000,
                "headers": [[name, value.decode()] for name, value in record.headers() or []],
                "value": record.value().decode(),
            }
        )
    consumer.close()
    return found


name, *arguments = sys.argv[1:]
print(json.dumps(globals()[name](*arguments)))
