//! `postbox.emit`, and what the outbox refuses.

use tokio_postgres::Client;
use tokio_postgres::error::SqlState;
use uuid::Uuid;

use crate::support::{Fixture, connect, wait_until};

async fn rows(fixture: &Fixture) -> i64 {
    let sql = "SELECT count(*) FROM postbox.outbox";
    fixture.client.query_one(sql, &[]).await.unwrap().get(0)
}

async fn emit(client: &Client, key: &str) -> Result<Uuid, tokio_postgres::Error> {
    let sql = "SELECT postbox.emit('order', '1', 'placed', '{}', idempotency_key => $1)";
    Ok(client.query_one(sql, &[&key]).await?.get(0))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_same_idempotency_key_again_gives_the_first_id_and_writes_nothing() {
    let fixture = Fixture::new().await;
    let first = emit(&fixture.client, "k").await.unwrap();
    assert_eq!(emit(&fixture.client, "k").await.unwrap(), first);
    assert_eq!(rows(&fixture).await, 1);
    assert_ne!(emit(&fixture.client, "other").await.unwrap(), first);
    // A plain INSERT with a taken key is dropped as well.
    let insert = "INSERT INTO postbox.outbox (aggregate_type, aggregate_id, event_type, idempotency_key) \
                  VALUES ('order', '1', 'placed', 'k')";
    assert_eq!(fixture.client.execute(insert, &[]).await.unwrap(), 0);
    assert_eq!(rows(&fixture).await, 2);
}

/// Begins to emit while another transaction, which then ends with `end`, holds
/// the key: the id of that one, and what the second got.
async fn race(
    fixture: &Fixture,
    isolation: &str,
    end: &str,
) -> (Uuid, Result<Uuid, tokio_postgres::Error>) {
    let (one, two) = (
        connect(&fixture.database_url).await,
        connect(&fixture.database_url).await,
    );
    one.batch_execute("BEGIN").await.unwrap();
    let first = emit(&one, "k").await.unwrap();
    two.batch_execute(&format!("BEGIN ISOLATION LEVEL {isolation}"))
        .await
        .unwrap();
    let second = tokio::spawn(async move {
        let second = emit(&two, "k").await;
        let end = if second.is_ok() { "COMMIT" } else { "ROLLBACK" };
        two.batch_execute(end).await.unwrap();
        second
    });
    wait_until("the second waits for the first", async || {
        let sql = "SELECT count(*) FROM pg_stat_activity \
                   WHERE datname = current_database() AND wait_event_type = 'Lock'";
        let row = fixture.client.query_one(sql, &[]).await.unwrap();
        row.get::<_, i64>(0) == 1
    })
    .await;
    one.batch_execute(end).await.unwrap();
    (first, second.await.unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_transactions_with_one_key_the_second_gets_the_id_that_was_committed() {
    let fixture = Fixture::new().await;
    let (first, second) = race(&fixture, "READ COMMITTED", "COMMIT").await;
    assert_eq!(second.unwrap(), first);
    assert_eq!(rows(&fixture).await, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_transactions_with_one_key_the_second_writes_if_the_first_rolls_back() {
    let fixture = Fixture::new().await;
    let (first, second) = race(&fixture, "READ COMMITTED", "ROLLBACK").await;
    let second = second.unwrap();
    assert_ne!(second, first);
    let sql = "SELECT id FROM postbox.outbox";
    let stored: Uuid = fixture.client.query_one(sql, &[]).await.unwrap().get(0);
    assert_eq!(stored, second);
    assert_eq!(emit(&fixture.client, "k").await.unwrap(), second);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_taken_since_a_serializable_transaction_began_fails_it() {
    let fixture = Fixture::new().await;
    for isolation in ["REPEATABLE READ", "SERIALIZABLE"] {
        let (_, second) = race(&fixture, isolation, "COMMIT").await;
        let code = second.unwrap_err().code().cloned();
        assert_eq!(
            code,
            Some(SqlState::T_R_SERIALIZATION_FAILURE),
            "{isolation}"
        );
        assert_eq!(rows(&fixture).await, 1);
        let forget = "DELETE FROM postbox.outbox; DELETE FROM postbox.idempotency";
        fixture.client.batch_execute(forget).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_argument_of_emit_is_a_column_and_what_is_left_out_is_null() {
    let fixture = Fixture::new().await;
    let id = Uuid::from_u128(7);
    let full = "SELECT postbox.emit('order', '1', 'placed', '{ \"a\":1}', 'topic', 'key', '{\"h\": \"1\"}', '2.0', \
                't', 'c', 'd', 'k', '2030-01-02 03:04:05Z', $1)";
    let given: Uuid = fixture.client.query_one(full, &[&id]).await.unwrap().get(0);
    assert_eq!(given, id);
    let bare = "SELECT postbox.emit('order', '1', 'gone', NULL)";
    fixture.client.query_one(bare, &[]).await.unwrap();
    let sql = "SELECT concat_ws('|', aggregate_type, aggregate_id, event_type, payload, topic, partition_key, headers, \
               schema_version, trace_id, correlation_id, causation_id, idempotency_key, \
               scheduled_at AT TIME ZONE 'UTC') FROM postbox.outbox ORDER BY seq";
    let stored = fixture.client.query(sql, &[]).await.unwrap();
    let stored: Vec<String> = stored.iter().map(|row| row.get(0)).collect();
    assert_eq!(
        stored,
        [
            "order|1|placed|{ \"a\":1}|topic|key|{\"h\": \"1\"}|2.0|t|c|d|k|2030-01-02 03:04:05",
            "order|1|gone"
        ]
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_traceparent_of_a_transaction_is_on_its_events_and_on_no_other() {
    let fixture = Fixture::new().await;
    let emit = "SELECT postbox.emit('order', '1', 'placed', '{}')";
    let traced =
        format!("BEGIN; SET LOCAL postbox.traceparent = '00-a-b-01'; {emit}; COMMIT; {emit}");
    fixture.client.batch_execute(&traced).await.unwrap();
    let sql = "SELECT traceparent FROM postbox.outbox ORDER BY seq";
    let stored = fixture.client.query(sql, &[]).await.unwrap();
    let stored: Vec<Option<String>> = stored.iter().map(|row| row.get(0)).collect();
    assert_eq!(stored, [Some("00-a-b-01".to_owned()), None]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn headers_that_are_no_object_are_refused_by_name() {
    let fixture = Fixture::new().await;
    for headers in ["[1]", "\"text\"", "1", "true", "null"] {
        let sql =
            format!("SELECT postbox.emit('order', '1', 'placed', '{{}}', headers => '{headers}')");
        let error = fixture.client.batch_execute(&sql).await.unwrap_err();
        let error = error.as_db_error().unwrap();
        assert_eq!(error.code(), &SqlState::CHECK_VIOLATION, "{headers}");
        assert_eq!(
            error.constraint(),
            Some("headers_is_an_object"),
            "{headers}"
        );
    }
    let sql = "SELECT postbox.emit('order', '1', 'placed', '{}', headers => '{}')";
    fixture.client.batch_execute(sql).await.unwrap();
    assert_eq!(rows(&fixture).await, 1);
}
