//! Where the database is, and how to log in.
