"""Real parallel file systems and a real S3 server on this machine: CephFS and Ceph's RGW, GlusterFS, MooseFS.

Each runs from Debian's packages in a folder of its own, needs no configuration of the machine, and is gone afterwards.
"""
