//! An order and its event, in one transaction.
//!
//! ```text
//! cargo run --example append -- postgres://localhost/shop
//! ```

use postbox::outbox::{self, NewEvent};
use tokio_postgres::NoTls;

type Failure = Box<dyn std::error::Error>;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Failure> {
    let url = std::env::args()
        .nth(1)
        .or_else(|| std::env::var("POSTBOX_DATABASE_URL").ok())
        .ok_or("usage: append postgres://user@host/database")?;
    let (mut client, connection) = tokio_postgres::connect(&url, NoTls).await?;
    tokio::spawn(connection);

    client
        .batch_execute("CREATE TABLE IF NOT EXISTS shop_order (id text PRIMARY KEY, cents bigint)")
        .await?;

    let transaction = client.transaction().await?;
    transaction
        .execute(
            "INSERT INTO shop_order VALUES ('42', 1700) ON CONFLICT DO NOTHING",
            &[],
        )
        .await?;
    let event = NewEvent::new(
        "order",
        "42",
        "order_placed",
        &serde_json::json!({"order": "42", "cents": 1700}),
    )?
    .header("source", "examples/append.rs")
    .idempotency_key("order_placed 42");
    let id = outbox::append(&transaction, event).await?;
    transaction.commit().await?;

    println!("{id}");
    Ok(())
}
