# What dev/debezium and bench/compare/debezium share: Kafka Connect, standalone, with Debezium's connector and its
# Outbox Event Router.
# shellcheck shell=bash disable=SC2034
. "$dev/java.sh"

connect_version_of() { sed -n "s|.*<$1>\(.*\)</.*|\1|p" "$dev/pom.xml"; }

connect_jars=$dev/.cache/connect-$(connect_version_of kafka.version)-debezium-$(connect_version_of debezium.version)

# The command, with these options for its JVM; what follows it are the files with the properties of the worker and of
# each connector.
connect_command() {
    connect=(java "$@" -XX:+UseG1GC -XX:MaxGCPauseMillis=20 -XX:InitiatingHeapOccupancyPercent=35
        -XX:+ExplicitGCInvokesConcurrent -Djava.awt.headless=true
        -Dorg.slf4j.simpleLogger.showDateTime=true -Dorg.slf4j.simpleLogger.dateTimeFormat=HH:mm:ss.SSS
        -cp "$connect_jars/*" org.apache.kafka.connect.cli.ConnectStandalone)
}

# Of a worker with the brokers $1 and its offsets in folder $2: what cannot be left out, and what makes text of what it
# sends. The REST server takes any free port.
worker_properties() {
    cat <<-END
	bootstrap.servers=$1
	listeners=http://127.0.0.1:0
	offset.storage.file.filename=$2/offsets
	key.converter=org.apache.kafka.connect.storage.StringConverter
	value.converter=org.apache.kafka.connect.storage.StringConverter
	header.converter=org.apache.kafka.connect.storage.StringConverter
	END
}

# The same, of any connector.
connector_properties() {
    cat <<-END
	connector.class=io.debezium.connector.postgresql.PostgresConnector
	tasks.max=1
	topic.prefix=debezium
	plugin.name=pgoutput
	snapshot.mode=no_data
	transforms=outbox
	transforms.outbox.type=io.debezium.transforms.outbox.EventRouter
	END
}
