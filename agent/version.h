/* The version, given by the build: -DAGENT_VERSION="\"0.1.0\"". */
#ifndef AGENT_VERSION_H
#define AGENT_VERSION_H

#ifndef AGENT_VERSION
#error "AGENT_VERSION is not defined: build through osbuild.agent"
#endif

/* osbuilder finds an agent's version in its bytes by this text. */
#define AGENT_MARKER "osbuilder-agent version=" AGENT_VERSION ";"

#endif
