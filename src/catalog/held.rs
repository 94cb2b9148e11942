//! What the holder of slices writes: each write names its epoch, and renews the leases.

use tokio_postgres::Client;
use tokio_postgres::types::{ToSql, Type};

use super::division::{doing, leave};
use super::{Slices, Standing, lease};
use crate::contract::Contract;
use crate::database::{query_after, sort};
use crate::error::{Error, ErrorKind, Result};

/// The slices that one attempt has.
#[derive(Debug, Clone)]
pub struct Held {
    /// Which.
    pub slices: Slices,
    pub(super) owner: String,
    pub(super) epoch: i64,
}

impl Held {
    /// What holds in SQL, of the relay $1, until another takes one of them over.
    pub(crate) fn fence(&self) -> String {
        let numbers: Vec<String> = self.slices.iter().map(|slice| slice.to_string()).collect();
        format!(
            "NOT EXISTS (SELECT FROM :\"schema\".slice WHERE name = $1 AND slice = ANY ('{{{}}}') AND epoch <> {})",
            numbers.join(","),
            self.epoch
        )
    }

    /// Goes on holding the leases.
    ///
    /// # Errors
    /// `SlotInUse` if another relay has one of them.
    pub async fn renew(&self, client: &Client, contract: &Contract) -> Result<()> {
        failpoint!("renewing_slices");
        let set = format!("epoch = s.epoch{}", lease::RENEWED);
        let renewed = self.write(client, contract, &set, "", &[]).await?;
        self.check(contract, self.slices, renewed)
    }

    /// Stores where slices stand.
    ///
    /// # Errors
    /// As [`renew`](Self::renew).
    pub async fn store(
        &self,
        client: &Client,
        contract: &Contract,
        standings: &[Standing],
    ) -> Result<()> {
        let set = format!(
            "snapshot = p.snapshot::pg_snapshot, second_snapshot = p.second_snapshot::pg_snapshot, seq = p.seq{}",
            lease::RENEWED
        );
        let from = "FROM unnest($5::bigint[], $6::text[], $7::text[], $8::bigint[]) \
                         AS p (slices, snapshot, second_snapshot, seq) \
                    WHERE p.slices >> s.slice & 1 = 1 AND";
        let gap = |standing: &Standing| standing.gap.clone();
        let slices: Vec<i64> = standings.iter().map(|place| place.slices.mask()).collect();
        let snapshots: Vec<&str> = standings.iter().map(|place| &*place.snapshot).collect();
        let untils = standings
            .iter()
            .map(|place| gap(place).map(|gap| gap.until));
        let untils: Vec<Option<String>> = untils.collect();
        let seqs = standings.iter().map(|place| gap(place).map(|gap| gap.seq));
        let seqs: Vec<Option<i64>> = seqs.collect();
        let values: [(&(dyn ToSql + Sync), Type); 4] = [
            (&slices, Type::INT8_ARRAY),
            (&snapshots, Type::TEXT_ARRAY),
            (&untils, Type::TEXT_ARRAY),
            (&seqs, Type::INT8_ARRAY),
        ];
        failpoint!("storing_slices");
        let stored = self.write(client, contract, &set, from, &values).await?;
        failpoint!("slices_stored");
        let all = standings
            .iter()
            .fold(Slices::default(), |all, standing| all.with(standing.slices));
        self.check(contract, all, stored)
    }

    /// Gives slices that others want to them. They must be drained, and their places stored.
    pub async fn hand_over(&self, client: &Client, contract: &Contract) -> Result<()> {
        failpoint!("handing_over");
        let set = format!(
            "owner = s.wanted_by, epoch = s.epoch + 1, wanted_by = NULL{}",
            lease::RENEWED
        );
        let from = "WHERE s.wanted_by <> s.owner AND";
        self.write(client, contract, &set, from, &[]).await?;
        failpoint!("handed_over");
        Ok(())
    }

    /// Lets others have the slices at once, and asks for no others.
    pub async fn release(&self, client: &Client, contract: &Contract) -> Result<()> {
        leave(client, contract, (&self.owner, Slices::default())).await
    }

    /// Lets others have what was handed to its owner since, and asks for no others.
    pub async fn release_others(&self, client: &Client, contract: &Contract) -> Result<()> {
        leave(client, contract, (&self.owner, self.slices)).await
    }

    /// Writes those of the slices that are still held, and says which were. `from` is what
    /// the values come from, and begins the condition.
    async fn write(
        &self,
        client: &Client,
        contract: &Contract,
        set: &str,
        from: &str,
        values: &[(&(dyn ToSql + Sync), Type)],
    ) -> Result<Slices> {
        let from = if from.is_empty() { "WHERE" } else { from };
        let sql = contract.sql(&format!(
            "UPDATE :\"schema\".slice AS s SET {set}, updated_at = now() \
             {from} s.name = $1 AND s.owner = $2 AND s.epoch = $3 AND $4::bigint >> s.slice & 1 = 1 \
             RETURNING s.slice"
        ));
        // What was handed to this owner meanwhile may have the same epoch.
        let mask = self.slices.mask();
        let mut parameters: Vec<(&(dyn ToSql + Sync), Type)> = vec![
            (&contract.slot, Type::TEXT),
            (&self.owner, Type::TEXT),
            (&self.epoch, Type::INT8),
            (&mask, Type::INT8),
        ];
        parameters.extend_from_slice(values);
        let rows = query_after(lease::BEGIN, client, &sql, &parameters).await;
        let rows = rows.map_err(|error| sort(doing("write", contract), error))?;
        let numbers = rows.iter().map(|row| row.get::<_, i32>(0).cast_unsigned());
        Ok(numbers.collect())
    }

    fn check(&self, contract: &Contract, expected: Slices, written: Slices) -> Result<()> {
        if written == expected {
            return Ok(());
        }
        let message = format!(
            "slices of relay \"{}\" were taken over by another: {} of {} are left",
            contract.slot,
            written.count(),
            expected.count()
        );
        Err(Error::new(ErrorKind::SlotInUse, message))
    }
}
