//! The replication slot.

use tokio_postgres::Client;
use tokio_postgres::types::{PgLsn, Type};

use crate::database::sort;
use crate::error::{Error, ErrorKind, Result};

/// What Postgres knows of a slot, and how far it is behind.
#[derive(Debug, Clone)]
pub struct SlotState {
    /// `logical` or `physical`.
    pub slot_type: String,
    /// The output plugin of a logical slot.
    pub plugin: Option<String>,
    /// The database of a logical slot.
    pub database: Option<String>,
    /// Whether that is the database of this session.
    pub in_this_database: bool,
    /// Whether the slot goes when its session ends.
    pub temporary: bool,
    /// Whether standbys keep a copy of the slot (Postgres 17 and later).
    pub failover: bool,
    /// The walsender that reads it.
    pub active_pid: Option<i32>,
    /// Whether that waits until its client reads, and does nothing else meanwhile: it was
    /// told to end, and has last words. Outside of these it never waits to write.
    pub is_ending: bool,
    /// From where the server keeps WAL for it.
    pub restart_lsn: Option<PgLsn>,
    /// Everything that committed before it has been confirmed.
    pub confirmed_flush_lsn: Option<PgLsn>,
    /// `reserved`, `extended`, `unreserved` or `lost`.
    pub wal_status: Option<String>,
    /// Why the server gave the slot up (Postgres 17 and later).
    pub invalidation_reason: Option<String>,
    /// Bytes of WAL until it may be lost; `None` without `max_slot_wal_keep_size`.
    pub safe_wal_size: Option<i64>,
    /// Where the server writes.
    pub wal_end: PgLsn,
}

/// The slot's state, or an error of kind `Slot` where there is no such slot.
pub async fn slot_state(client: &Client, slot: &str) -> Result<SlotState> {
    find_slot(client, slot).await?.ok_or_else(|| {
        Error::new(
            ErrorKind::Slot,
            format!("replication slot \"{slot}\" does not exist"),
        )
    })
}

/// The slot's state, if there is such a slot.
pub async fn find_slot(client: &Client, slot: &str) -> Result<Option<SlotState>> {
    // to_jsonb: invalidation_reason and failover came with Postgres 17.
    let sql = "SELECT slot_type, plugin::text, database::text, coalesce(database = current_database(), false), \
                      temporary, active_pid, restart_lsn, confirmed_flush_lsn, wal_status, \
                      to_jsonb(s) ->> 'invalidation_reason', safe_wal_size, \
                      coalesce((to_jsonb(s) ->> 'failover')::boolean, false), \
                      pg_current_wal_lsn(), coalesce(a.wait_event = 'ClientWrite', false) \
               FROM pg_replication_slots AS s LEFT JOIN pg_stat_activity AS a ON a.pid = s.active_pid \
               WHERE slot_name = $1::text::name";
    let rows = client
        .query_typed(sql, &[(&slot, Type::TEXT)])
        .await
        .map_err(|error| sort(format!("read replication slot \"{slot}\""), error))?;
    Ok(rows.first().map(|row| SlotState {
        slot_type: row.get(0),
        plugin: row.get(1),
        database: row.get(2),
        in_this_database: row.get(3),
        temporary: row.get(4),
        active_pid: row.get(5),
        restart_lsn: row.get(6),
        confirmed_flush_lsn: row.get(7),
        wal_status: row.get(8),
        invalidation_reason: row.get(9),
        safe_wal_size: row.get(10),
        failover: row.get(11),
        wal_end: row.get(12),
        is_ending: row.get(13),
    }))
}

/// Whether this role may replicate: superusers, the attribute, or a role that lends it.
pub(crate) const MAY_REPLICATE: &str = "SELECT coalesce(bool_or(r.rolsuper OR r.rolreplication OR EXISTS ( \
         SELECT FROM pg_roles AS lent WHERE lent.rolname = 'rds_replication' AND pg_has_role(r.oid, lent.oid, 'MEMBER') \
     )), false) FROM pg_roles AS r WHERE r.rolname = $1::text::name";

/// Why no slot is to be had, as far as the server tells. Of a pooler in between it knows
/// nothing.
pub(crate) async fn what_prevents_a_slot(client: &Client) -> Result<Option<String>> {
    let sql = format!(
        "SELECT CASE \
             WHEN wal_level <> 'logical' THEN format('wal_level is \"%s\" and must be \"logical\"', wal_level) \
             WHEN NOT ({MAY_REPLICATE}) THEN format('role \"%s\" may not replicate', $1) \
             WHEN current_setting('max_wal_senders') = '0' THEN 'max_wal_senders is 0' \
             WHEN (SELECT count(*) FROM pg_replication_slots) >= slots THEN format('no replication slot is free, max_replication_slots is %s', slots) \
         END \
         FROM (SELECT current_setting('wal_level') AS wal_level, \
                      current_setting('max_replication_slots')::bigint AS slots) AS s"
    );
    let doing = "look for what prevents a replication slot";
    let role = client
        .query_typed_one("SELECT session_user::text", &[])
        .await;
    let role: String = role.map_err(|error| sort(doing, error))?.get(0);
    let row = client.query_typed_one(&sql, &[(&role, Type::TEXT)]).await;
    Ok(row.map_err(|error| sort(doing, error))?.get(0))
}

impl SlotState {
    /// Bytes of WAL that the server keeps for it.
    pub fn retained_bytes(&self) -> i64 {
        self.bytes_since(self.restart_lsn)
    }

    /// Bytes of WAL that are not confirmed yet.
    pub fn lag_bytes(&self) -> i64 {
        self.bytes_since(self.confirmed_flush_lsn)
    }

    fn bytes_since(&self, lsn: Option<PgLsn>) -> i64 {
        // A confirmed position can be ahead of the local WAL's end for a moment after a
        // crash: never less than nothing.
        let bytes = lsn.map_or(0, |lsn| u64::from(self.wal_end).saturating_sub(lsn.into()));
        i64::try_from(bytes).unwrap_or(i64::MAX)
    }

    /// Refuses a slot that cannot be ours, and one that has lost its WAL.
    pub fn check(&self, slot: &str) -> Result<()> {
        self.check_ours(slot)?;
        if self.is_lost() {
            let reason = self.invalidation_reason.as_deref().unwrap_or("wal_removed");
            return Err(refused(
                slot,
                &format!(
                    "was invalidated by the server ({reason}) and can no longer be read: {AFTER_LOSS}"
                ),
            ));
        }
        Ok(())
    }

    /// Refuses a slot that cannot be ours: one of another kind or database.
    pub(crate) fn check_ours(&self, slot: &str) -> Result<()> {
        let refuse = |why: String| Err(refused(slot, &why));
        let other = "choose another name with `--slot`";
        if self.slot_type != "logical" {
            return refuse(format!(
                "is {} and must be logical: {other}",
                self.slot_type
            ));
        }
        let plugin = self.plugin.as_deref().unwrap_or_default();
        if plugin != "pgoutput" {
            return refuse(format!(
                "has output plugin \"{plugin}\" and must have \"pgoutput\": {other}"
            ));
        }
        if !self.in_this_database {
            let database = self.database.as_deref().unwrap_or_default();
            return refuse(format!("belongs to database \"{database}\": {other}"));
        }
        if self.temporary {
            return refuse(format!(
                "is temporary, and goes with the session that made it: {other}"
            ));
        }
        Ok(())
    }

    /// Refuses a slot that a session is reading.
    pub fn check_unused(&self, slot: &str) -> Result<()> {
        match self.active_pid {
            None => Ok(()),
            Some(pid) => Err(Error::new(
                ErrorKind::SlotInUse,
                format!("replication slot \"{slot}\" is in use by process {pid}"),
            )),
        }
    }

    /// Whether the server has given the slot up, or the WAL it needs.
    pub fn is_lost(&self) -> bool {
        self.invalidation_reason.is_some() || self.wal_status.as_deref() == Some("lost")
    }
}

fn refused(slot: &str, why: &str) -> Error {
    Error::new(
        ErrorKind::Slot,
        format!("replication slot \"{slot}\" {why}"),
    )
}

/// What to do when the slot can no longer be read.
pub(super) const AFTER_LOSS: &str = "run `postbox recover`, which makes a new slot, and the relay first sends what the \
                                     outbox holds since the last checkpoint";
