//! An order and its event, in one transaction.
//!
//! ```text
//! postbox setup --database-url postgres://me@localhost/shop
//! cargo run --example append -- postgres://me@localhost/shop 42
//! ```
//!
//! The event is sent to the topic "order" by
//! `postbox relay --database-url postgres://me@localhost/shop --brokers localhost:9092`.
//! Run again with the same order, it writes nothing and prints the same id: the
//! idempotency key is taken.

use std::error::Error;
use std::process::ExitCode;

use postbox::outbox::{self, NewEvent};
use tokio_postgres::NoTls;

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let url = arguments.next();
    let order = arguments.next().unwrap_or_else(|| "42".to_owned());
    let Some(url) = url.or_else(|| std::env::var("POSTBOX_DATABASE_URL").ok()) else {
        eprintln!("usage: append postgres://user@host/database [ORDER]");
        return ExitCode::FAILURE;
    };
    match place(&url, &order).await {
        Ok(id) => {
            println!("event {id}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            let cause = error.source().map(|cause| format!(": {cause}"));
            eprintln!("error: {error}{}", cause.unwrap_or_default());
            ExitCode::FAILURE
        }
    }
}

/// Places an order, once, and returns the id of its event.
async fn place(url: &str, order: &str) -> Result<uuid::Uuid, Box<dyn Error>> {
    let (mut client, connection) = tokio_postgres::connect(url, NoTls).await?;
    tokio::spawn(connection);
    client
        .batch_execute("CREATE TABLE IF NOT EXISTS shop_order (id text PRIMARY KEY, cents bigint)")
        .await?;

    let transaction = client.transaction().await?;
    transaction
        .execute(
            "INSERT INTO shop_order VALUES ($1, 1700) ON CONFLICT DO NOTHING",
            &[&order],
        )
        .await?;
    let event = NewEvent::new(
        "order",
        order,
        "order_placed",
        &serde_json::json!({"order": order, "cents": 1700}),
    )?
    .header("source", "examples/append.rs")
    .idempotency_key(format!("order_placed {order}"));
    let id = outbox::append(&transaction, event).await?;
    // Both or neither: without this, no order and no event.
    transaction.commit().await?;
    Ok(id)
}
