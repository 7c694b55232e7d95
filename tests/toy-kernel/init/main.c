#ifdef CONFIG_BROKEN
#error this toy is broken
#endif

const char banner[] __attribute__((used)) = "toy " BUILD_USER " " BUILD_TIME;
const char where[] __attribute__((used)) = __FILE__;

#ifdef CONFIG_PRINTK
const char says[] __attribute__((used)) = "hello";
#endif

void _start(void)
{
}
