/* The names of all system calls of the architectures we know, and their numbers on each.
 *
 * Whose number is the same everywhere (from 424 on it is) says so here, so that a guest's kernel may be newer than the
 * headers this was compiled with; the others' numbers are those of the kernel's headers. */
#ifndef AGENT_SYSCALLS_H
#define AGENT_SYSCALLS_H

#include <stdint.h>

#define SYSCALLS(X) \
    X(_llseek) X(_newselect) X(_sysctl) X(accept) X(accept4) X(access) X(acct) X(add_key) X(adjtimex) X(afs_syscall) \
    X(alarm) X(arc_gettls) X(arc_settls) X(arc_usr_cmpxchg) X(arch_prctl) X(bdflush) X(bind) X(bpf) X(break) X(brk) \
    X(cacheflush) X(capget) X(capset) X(chdir) X(chmod) X(chown) X(chown32) X(chroot) X(clock_adjtime) \
    X(clock_adjtime64) X(clock_getres) X(clock_getres_time64) X(clock_gettime) X(clock_gettime64) X(clock_nanosleep) \
    X(clock_nanosleep_time64) X(clock_settime) X(clock_settime64) X(clone) X(close) X(connect) X(copy_file_range) \
    X(creat) X(create_module) X(delete_module) X(dup) X(dup2) X(dup3) X(epoll_create) X(epoll_create1) X(epoll_ctl) \
    X(epoll_ctl_old) X(epoll_pwait) X(epoll_wait) X(epoll_wait_old) X(eventfd) X(eventfd2) X(execve) X(execveat) \
    X(exit) X(exit_group) X(faccessat) X(fadvise64) X(fadvise64_64) X(fallocate) X(fanotify_init) X(fanotify_mark) \
    X(fchdir) X(fchmod) X(fchmodat) X(fchown) X(fchown32) X(fchownat) X(fcntl) X(fcntl64) X(fdatasync) X(fgetxattr) \
    X(finit_module) X(flistxattr) X(flock) X(fork) X(fremovexattr) X(fsetxattr) X(fstat) X(fstat64) X(fstatat) \
    X(fstatat64) X(fstatfs) X(fstatfs64) X(fsync) X(ftime) X(ftruncate) X(ftruncate64) X(futex) X(futex_time64) \
    X(futimesat) X(get_kernel_syms) X(get_mempolicy) X(get_robust_list) X(get_thread_area) X(getcpu) X(getcwd) \
    X(getdents) X(getdents64) X(getegid) X(getegid32) X(geteuid) X(geteuid32) X(getgid) X(getgid32) X(getgroups) \
    X(getgroups32) X(getitimer) X(getpeername) X(getpgid) X(getpgrp) X(getpid) X(getpmsg) X(getppid) X(getpriority) \
    X(getrandom) X(getresgid) X(getresgid32) X(getresuid) X(getresuid32) X(getrlimit) X(getrusage) X(getsid) \
    X(getsockname) X(getsockopt) X(gettid) X(gettimeofday) X(getuid) X(getuid32) X(getxattr) X(gtty) X(idle) \
    X(init_module) X(inotify_add_watch) X(inotify_init) X(inotify_init1) X(inotify_rm_watch) X(io_cancel) \
    X(io_destroy) X(io_getevents) X(io_pgetevents) X(io_pgetevents_time64) X(io_setup) X(io_submit) X(ioctl) \
    X(ioperm) X(iopl) X(ioprio_get) X(ioprio_set) X(ipc) X(kcmp) X(kexec_file_load) X(kexec_load) X(keyctl) X(kill) \
    X(lchown) X(lchown32) X(lgetxattr) X(link) X(linkat) X(listen) X(listxattr) X(llistxattr) X(llseek) X(lock) \
    X(lookup_dcookie) X(lremovexattr) X(lseek) X(lsetxattr) X(lstat) X(lstat64) X(madvise) X(mbind) X(membarrier) \
    X(memfd_create) X(migrate_pages) X(mincore) X(mkdir) X(mkdirat) X(mknod) X(mknodat) X(mlock) X(mlock2) \
    X(mlockall) X(mmap) X(mmap2) X(modify_ldt) X(mount) X(move_pages) X(mprotect) X(mpx) X(mq_getsetattr) \
    X(mq_notify) X(mq_open) X(mq_timedreceive) X(mq_timedreceive_time64) X(mq_timedsend) X(mq_timedsend_time64) \
    X(mq_unlink) X(mremap) X(msgctl) X(msgget) X(msgrcv) X(msgsnd) X(msync) X(munlock) X(munlockall) X(munmap) \
    X(name_to_handle_at) X(nanosleep) X(newfstatat) X(nfsservctl) X(nice) X(oldfstat) X(oldlstat) X(oldolduname) \
    X(oldstat) X(olduname) X(open) X(open_by_handle_at) X(openat) X(or1k_atomic) X(pause) X(perf_event_open) \
    X(personality) X(pipe) X(pipe2) X(pivot_root) X(pkey_alloc) X(pkey_free) X(pkey_mprotect) X(poll) X(ppoll) \
    X(ppoll_time64) X(prctl) X(pread64) X(preadv) X(preadv2) X(prlimit64) X(process_vm_readv) X(process_vm_writev) \
    X(prof) X(profil) X(pselect6) X(pselect6_time64) X(ptrace) X(putpmsg) X(pwrite64) X(pwritev) X(pwritev2) \
    X(query_module) X(quotactl) X(read) X(readahead) X(readdir) X(readlink) X(readlinkat) X(readv) X(reboot) \
    X(recvfrom) X(recvmmsg) X(recvmmsg_time64) X(recvmsg) X(remap_file_pages) X(removexattr) X(rename) X(renameat) \
    X(renameat2) X(request_key) X(restart_syscall) X(riscv_flush_icache) X(riscv_hwprobe) X(rmdir) X(rseq) \
    X(rt_sigaction) X(rt_sigpending) X(rt_sigprocmask) X(rt_sigqueueinfo) X(rt_sigreturn) X(rt_sigsuspend) \
    X(rt_sigtimedwait) X(rt_sigtimedwait_time64) X(rt_tgsigqueueinfo) X(sched_get_priority_max) \
    X(sched_get_priority_min) X(sched_getaffinity) X(sched_getattr) X(sched_getparam) X(sched_getscheduler) \
    X(sched_rr_get_interval) X(sched_rr_get_interval_time64) X(sched_setaffinity) X(sched_setattr) X(sched_setparam) \
    X(sched_setscheduler) X(sched_yield) X(seccomp) X(security) X(select) X(semctl) X(semget) X(semop) X(semtimedop) \
    X(semtimedop_time64) X(sendfile) X(sendfile64) X(sendmmsg) X(sendmsg) X(sendto) X(set_mempolicy) \
    X(set_robust_list) X(set_thread_area) X(set_tid_address) X(setdomainname) X(setfsgid) X(setfsgid32) X(setfsuid) \
    X(setfsuid32) X(setgid) X(setgid32) X(setgroups) X(setgroups32) X(sethostname) X(setitimer) X(setns) X(setpgid) \
    X(setpriority) X(setregid) X(setregid32) X(setresgid) X(setresgid32) X(setresuid) X(setresuid32) X(setreuid) \
    X(setreuid32) X(setrlimit) X(setsid) X(setsockopt) X(settimeofday) X(setuid) X(setuid32) X(setxattr) X(sgetmask) \
    X(shmat) X(shmctl) X(shmdt) X(shmget) X(shutdown) X(sigaction) X(sigaltstack) X(signal) X(signalfd) X(signalfd4) \
    X(sigpending) X(sigprocmask) X(sigreturn) X(sigsuspend) X(socket) X(socketcall) X(socketpair) X(splice) \
    X(ssetmask) X(stat) X(stat64) X(statfs) X(statfs64) X(statx) X(stime) X(stty) X(swapoff) X(swapon) X(symlink) \
    X(symlinkat) X(sync) X(sync_file_range) X(sync_file_range2) X(syncfs) X(sysfs) X(sysinfo) X(syslog) X(tee) \
    X(tgkill) X(time) X(timer_create) X(timer_delete) X(timer_getoverrun) X(timer_gettime) X(timer_gettime64) \
    X(timer_settime) X(timer_settime64) X(timerfd_create) X(timerfd_gettime) X(timerfd_gettime64) X(timerfd_settime) \
    X(timerfd_settime64) X(times) X(tkill) X(truncate) X(truncate64) X(tuxcall) X(ugetrlimit) X(ulimit) X(umask) \
    X(umount) X(umount2) X(uname) X(unlink) X(unlinkat) X(unshare) X(uretprobe) X(uselib) X(userfaultfd) X(ustat) \
    X(utime) X(utimensat) X(utimensat_time64) X(utimes) X(vfork) X(vhangup) X(vm86) X(vm86old) X(vmsplice) \
    X(vserver) X(wait4) X(waitid) X(waitpid) X(write) X(writev)

#define SYSCALLS_OF_ALL(X) \
    X(pidfd_send_signal, 424) X(io_uring_setup, 425) X(io_uring_enter, 426) X(io_uring_register, 427) \
    X(open_tree, 428) X(move_mount, 429) X(fsopen, 430) X(fsconfig, 431) X(fsmount, 432) X(fspick, 433) \
    X(pidfd_open, 434) X(clone3, 435) X(close_range, 436) X(openat2, 437) X(pidfd_getfd, 438) X(faccessat2, 439) \
    X(process_madvise, 440) X(epoll_pwait2, 441) X(mount_setattr, 442) X(quotactl_fd, 443) \
    X(landlock_create_ruleset, 444) X(landlock_add_rule, 445) X(landlock_restrict_self, 446) X(memfd_secret, 447) \
    X(process_mrelease, 448) X(futex_waitv, 449) X(set_mempolicy_home_node, 450) X(cachestat, 451) X(fchmodat2, 452) \
    X(map_shadow_stack, 453) X(futex_wake, 454) X(futex_wait, 455) X(futex_requeue, 456) X(statmount, 457) \
    X(listmount, 458) X(lsm_get_self_attr, 459) X(lsm_set_self_attr, 460) X(lsm_list_modules, 461) X(mseal, 462) \
    X(setxattrat, 463) X(getxattrat, 464) X(listxattrat, 465) X(removexattrat, 466) X(open_tree_attr, 467)

#define SYSCALLS_ONE(...) 1 +
enum { SYSCALLS_COUNT = SYSCALLS(SYSCALLS_ONE) SYSCALLS_OF_ALL(SYSCALLS_ONE) 0 };

/* Numbers in the order of the lists; -1: the architecture has none of that name. Without the bit of x32. */
extern const int16_t syscalls_native[];
#ifdef __x86_64__
extern const int16_t syscalls_x86[];
extern const int16_t syscalls_x32[];
#endif

/* A file that includes this gets a constant of -1 for every name. The kernel's header, included behind it, covers those
 * that it knows with macros of their numbers. */
#define SYSCALLS_ABSENT(name) __NR_##name = -1,
#define SYSCALLS_NUMBER(name) __NR_##name,
#define SYSCALLS_SAME(name, number) number,
#define SYSCALLS_TABLE {SYSCALLS(SYSCALLS_NUMBER) SYSCALLS_OF_ALL(SYSCALLS_SAME)}

#endif
